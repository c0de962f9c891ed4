"""Scan: which pairs of a data set lie, shard by shard, resumable.

    scan = Scan.run("shards/{00000..00041}.tar", clip_encoder("ViT-B-32", "laion2b_s34b_b79k"), "scan")
    scan.summary(); scan.report(); next(scan.rows())
    Scan.load("scan")

Two passes. Every unit is encoded (`curation.encode`), then every unit is scored against one fixed reference
(`curation.score`). A unit's result appears whole or not at all; a killed scan goes on where it was and ends with the
same rows.
What lies in the folder: docs/formats.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip import __version__
from otcclip.attacks.records import read_records
from otcclip.curation.decide import Rule
from otcclip.curation.encode import is_encoded
from otcclip.curation.encoders import ScanEncoder
from otcclip.curation.finish import check_skipped, failure_of, finish
from otcclip.curation.options import ScanOptions
from otcclip.curation.passes import Scoring, encode_units
from otcclip.curation.score import take_census
from otcclip.curation.units import find_units, share
from otcclip.data.atomic import atomic_folder, write_json
from otcclip.detectors import make
from otcclip.errors import UserError

SETTINGS, SUMMARY, ROWS, SKIPPED = "scan.json", "summary.json", "scan.parquet", "skipped.parquet"
RESULTS = (SETTINGS, SUMMARY, ROWS, SKIPPED, "gallery.parquet", "report.html")


@dataclass(frozen=True)
class Scan:
    """A scan's folder. `failures` are units that could not be read, and why; `waiting` counts units that are not done
    yet because another job has them."""

    folder: Path
    failures: tuple[tuple[str, str], ...] = ()
    waiting: int = 0

    @classmethod
    def run(
        cls,
        source: str | Path | Sequence[str | Path],
        encoder: ScanEncoder,
        out: Path | str,
        options: ScanOptions | None = None,
        poison: Path | str | None = None,
    ) -> Scan:
        """Scan `source` into the folder `out`.

        Args:
            poison: ground truth, where it is known: detection is then measured. No score depends on it.

        Raises:
            UserError: nothing to read, a folder of another scan, no ground truth where it is said to be, too many bad
                pairs, or a full disk. A shard that cannot be read stops nobody else: it is in `failures`, and `resume`
                tries it again.
        """
        options = options or ScanOptions()
        folder = Path(out)
        chosen = [make(name) for name in options.detectors]
        source_text = [str(item) for item in ([source] if isinstance(source, str | Path) else source)]
        if poison is not None:
            read_records(poison)  # now, not after hours
        fresh = _claim(folder, _identity(source_text, encoder, options), options)
        try:
            units = find_units(source, options.dataset_type, folder, options.read)
        except UserError:
            if fresh and options.num_shards == 1:  # nothing was begun: a mistyped source leaves nothing in the way
                shutil.rmtree(folder, ignore_errors=True)
            raise
        mine = share(units, options.shard_index, options.num_shards)
        failures = encode_units(mine, encoder, folder, options)
        there = [unit for unit in units if is_encoded(unit, folder)]
        missing = [unit for unit in units if unit not in there and not (folder / "failed" / unit.name).is_file()]
        if missing:
            return cls(folder, failures, len(missing))
        if not there:
            raise UserError(f"none of the {len(units)} shards could be read; the first: {failure_of(units[0], folder)}")
        census = take_census(there, folder, options.reference)
        reasons = check_skipped(units, there, folder, census, options.max_bad)
        job = Scoring(there, folder, census, (encoder.joint, encoder.local), chosen, options)
        waiting = job.run(mine)
        if not waiting:
            drawn = job.reference() if encoder.joint and encoder.local else None
            finish(units, there, folder, census, chosen, reasons, poison, drawn, options.limits)
        return cls(folder, failures, waiting)

    @classmethod
    def load(cls, folder: Path | str) -> Scan:
        """A finished scan.

        Raises:
            UserError: no finished scan there.
        """
        if not (Path(folder) / SUMMARY).is_file() or not (Path(folder) / ROWS).is_file():
            raise UserError(
                f"{folder}: no finished scan here (no {SUMMARY} and {ROWS}); go on with --resume if it was cut off"
            )
        return cls(Path(folder))

    def save(self, folder: Path | str) -> Scan:
        """Copy the results, without the features, to another folder (which is replaced).

        Raises:
            UserError: not finished, or a full disk.
        """
        Scan.load(self.folder)
        with atomic_folder(folder) as made:
            for name in RESULTS:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, made / name)
        return Scan.load(folder)

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """ScanRows one at a time, in the shards' order."""
        for batch in self.batches(columns):
            yield from batch.to_pylist()

    def batches(self, columns: list[str] | None = None, name: str = ROWS) -> Iterator[pa.RecordBatch]:
        """ScanRows some at a time, or the rows of the folder's other Parquet `name`.

        Raises:
            UserError: damaged, or one of the `columns` is missing.
        """
        path = self.folder / name
        with _parquet(path) as file:
            if missing := set(columns or ()) - set(file.schema_arrow.names):
                raise UserError(f"{path}: column {min(missing)!r} is missing")
            try:
                yield from file.iter_batches(columns=columns)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None

    def settings(self) -> dict[str, Any]:
        """What was asked for: the object of `scan.json`.

        Raises:
            UserError: missing or damaged.
        """
        path = self.folder / SETTINGS
        try:
            found = json.loads(path.read_text("utf-8"))
            return {name: found[name] for name in ("source", "dataset_type", "read", "limits", "rule")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: missing or damaged ({type(error).__name__})") from None

    def rule(self) -> Rule:
        """The scan's own rule.

        Raises:
            UserError: missing or damaged.
        """
        try:
            return Rule(**self.settings()["rule"])
        except TypeError:
            raise UserError(f"{self.folder / SETTINGS}: damaged (its rule is none)") from None

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """ScanRows as one Arrow table."""
        with _parquet(self.folder / ROWS) as file:
            return file.read(columns=columns)

    def summary(self) -> dict[str, Any]:
        """Counts, throughput and, where the truth is known, detection (docs/formats.md)."""
        value: dict[str, Any] = json.loads((Scan.load(self.folder).folder / SUMMARY).read_text("utf-8"))
        return value

    def report(self) -> Path:
        """Write `report.html` of the folder and return its path."""
        from otcclip.report.scan import write_scan_report

        page: Path = write_scan_report(self.folder)
        return page


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _identity(source: list[str], encoder: ScanEncoder, options: ScanOptions) -> dict[str, Any]:
    """What must agree for a scan to be gone on with. `json` turns tuples into lists, as reading it back does."""
    value = {
        "source": source,
        "dataset_type": options.dataset_type,
        "read": asdict(options.read),
        "encoder": encoder.identity() | {"image_size": encoder.image_size},
        "limits": asdict(options.limits),
        "version": __version__,
    }
    settings: dict[str, Any] = json.loads(json.dumps(value))
    return settings


def _claim(folder: Path, identity: dict[str, Any], options: ScanOptions) -> bool:
    """Begin a scan in an empty folder, or make sure that the one found there is this one; whether it is begun now."""
    path = folder / SETTINGS
    fresh = not path.exists()
    if fresh:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and options.num_shards == 1:
            raise UserError(f"{folder}: is there already and holds no scan; name another --out")
    else:
        try:
            found = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            raise UserError(f"{path}: damaged; delete the folder or name another --out") from None
        differs = [name for name in identity if found.get(name) != identity[name]]
        if differs:
            raise UserError(f"{folder}: holds a scan of another {differs[0].replace('_', ' ')}; name another --out")
        if not options.resume and options.num_shards == 1:
            raise UserError(f"{folder}: holds a scan already; --resume goes on with it, or name another --out")
    shown = {"detectors": list(options.detectors), "rule": options.rule.as_dict(), "reference": options.reference}
    if not fresh and any(found.get(name) != value for name, value in shown.items()):
        (folder / SUMMARY).unlink(missing_ok=True)  # what is there was not decided so: it is finished when done again
    write_json(path, identity | shown)
    return fresh
