"""The end of a scan: one file of rows, what was skipped, the worst pairs with their images, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.curation.encode import encoded, unit_table
from otcclip.curation.gallery import write_gallery
from otcclip.curation.measure import measure
from otcclip.curation.score import Census, column, row_schema, rows_path
from otcclip.curation.units import INDEX_SKIPPED, Unit
from otcclip.data.atomic import atomic_file, write_json
from otcclip.data.decode import Limits
from otcclip.data.shards import Skipped
from otcclip.data.store import check_bad, write_skipped
from otcclip.detectors import Detector, PairFeatures
from otcclip.errors import UserError


def check_skipped(
    units: Sequence[Unit], there: Sequence[Unit], folder: Path, census: Census, max_bad: float
) -> Counter[str]:
    """Write `skipped.parquet`; returns counts by reason.

    Raises:
        UserError: more than `max_bad` of the pairs are bad.
    """
    skipped = [row for name in (INDEX_SKIPPED, *(unit.name for unit in units)) for row in _skipped(folder, name)]
    for unit in there:
        twice = np.setdiff1d(np.arange(encoded(unit, folder).pairs), census.usable[unit.name])
        if len(twice):
            keys = unit_table(unit, folder, ["key"])["key"].take(pa.array(twice))
            skipped += [Skipped(key, unit.source, "duplicate key") for key in keys.to_pylist()]
    write_skipped(folder / "skipped.parquet", skipped)
    check_bad(skipped, census.pairs + len(skipped), max_bad)
    return Counter(row.reason for row in skipped)


def _skipped(folder: Path, name: str) -> list[Skipped]:
    path = folder / "skipped" / f"{name}.parquet"
    try:
        return [Skipped(**row) for row in pq.read_table(path).to_pylist()] if path.is_file() else []
    except (OSError, TypeError, pa.ArrowException):
        raise UserError(f"{path}: damaged; delete it and features/{name}.*, and scan again with --resume") from None


def finish(
    units: Sequence[Unit],
    there: Sequence[Unit],
    folder: Path,
    census: Census,
    detectors: Sequence[Detector],
    reasons: Mapping[str, int],
    poison: Path | str | None,
    reference: PairFeatures | None,
    limits: Limits,
) -> None:
    """Write `scan.parquet`, `gallery.parquet` and `summary.json`, in this order; the summary says that it is finished.

    Raises:
        UserError: a damaged part, a source that changed since it was scanned, or a full disk.
    """
    schema = row_schema(detectors)
    actions: Counter[str] = Counter()
    with atomic_file(folder / "scan.parquet") as handle, pq.ParquetWriter(handle, schema) as writer:
        for unit in there:
            try:
                with pq.ParquetFile(rows_path(unit, folder)) as file:
                    for batch in file.iter_batches():
                        actions.update(batch["action"].to_pylist())
                        writer.write_batch(batch)
            except (OSError, pa.ArrowException) as error:
                path = rows_path(unit, folder)
                raise UserError(f"{path}: damaged ({error}); delete it and scan again with --resume") from None
    names = [column(detector) for detector in detectors]
    write_gallery(there, folder, names, reference, None if poison is None else Path(poison), limits)
    summary: dict[str, Any] = {
        "pairs": census.pairs,
        "reference": sum(map(len, census.chosen.values())),
        "actions": {name: actions.get(name, 0) for name in ("keep", "re-pair", "drop")},
        "skipped": dict(reasons),
        "units": len(units),
        "failed": {unit.name: failure_of(unit, folder) for unit in units if unit not in there},
        "detectors": {d.name: {"column": column(d), "comparable": d.comparable} for d in detectors},
        "throughput": _throughput(there, folder),
    }
    if poison is not None:
        summary["truth"] = measure(folder, there, names, Path(poison))
    write_json(folder / "summary.json", summary)


def failure_of(unit: Unit, folder: Path) -> str:
    """Why a unit was not scanned; by any job that shares the scan's folder."""
    path = folder / "failed" / unit.name
    return str(json.loads(path.read_text("utf-8"))["reason"]) if path.is_file() else "not scanned"


def _throughput(there: Sequence[Unit], folder: Path) -> dict[str, float]:
    """Seconds of all jobs together; the encoder's own are those of its forward passes over the same pairs."""
    done = [encoded(unit, folder) for unit in there]
    pairs, encoder = sum(one.pairs for one in done), sum(one.encoder_seconds for one in done)
    scoring = sum(json.loads(path.read_text("utf-8"))["seconds"] for path in (folder / "timing").glob("*.json"))
    seconds = sum(one.seconds for one in done) + scoring
    return {
        "seconds": seconds,
        "encoder_seconds": encoder,
        "scoring_seconds": scoring,
        "pairs_per_second": pairs / seconds if seconds else 0.0,
        "encoder_pairs_per_second": pairs / encoder if encoder else 0.0,
        "ratio": encoder / seconds if seconds else 0.0,
    }
