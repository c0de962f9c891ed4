"""Repair: from a scan to a manifest, or to a new data set. The input is read and never written.

    repair("scan", "repaired", to="wds")

Every pair's original caption is kept: in the manifest's `caption`, and beside the new one in what is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from otcclip.curation.decide import DROP, KEEP, REPAIR, Rule
from otcclip.curation.scan import ROWS, SKIPPED, Scan
from otcclip.curation.units import Unit, find_units
from otcclip.curation.writers import WRITERS, Mended
from otcclip.data.atomic import atomic_folder, write_json
from otcclip.data.decode import Limits
from otcclip.data.keys import first_of_each, hash_keys
from otcclip.data.readers import ReadOptions
from otcclip.errors import UserError
from otcclip.progress import track
from otcclip.registry import did_you_mean

MANIFEST = pa.schema(
    [
        ("key", pa.large_string()),
        ("unit", pa.string()),
        ("action", pa.string()),
        ("caption", pa.large_string()),
        ("new_caption", pa.large_string()),
        ("new_caption_key", pa.large_string()),
        ("lie", pa.float64()),
        ("sha256", pa.string()),
    ]
)
LEVELS = ("lie", "best_lie", "best_place", "best_looks_place", "margin")
COLUMNS = ["key", "unit", "caption", *LEVELS, "best_caption", "best_key", "sha256"]


@dataclass(frozen=True)
class Repaired:
    """What was written: the manifest, counts by action, and pairs in the new data set (0 where none was asked for).

    Attributes:
        actions: of the pairs that were judged.
        skipped: pairs that the scan skipped: they are dropped too, and counted here alone.
        data: the new data set, as a reader takes it; None where none was asked for.
    """

    manifest: Path
    actions: dict[str, int]
    skipped: int
    written: int
    data: Path | None


def repair(scan: Scan | Path | str, out: Path | str, rule: Rule | None = None, to: str | None = None) -> Repaired:
    """Apply a rule to a finished scan.

    Args:
        out: folder for manifest.parquet and the new data set; it must not be there yet. It appears whole or not at all.
        rule: the scan's own by default.
        to: a format of `WRITERS`, or None for the manifest alone.

    Raises:
        UserError: no finished scan, an unknown format, a folder in the way, a source that changed since the scan, or a
            full disk.
    """
    scan = scan if isinstance(scan, Scan) else Scan.load(scan)
    target = Path(out)
    if target.exists():
        raise UserError(f"{target}: is there already; name another --out")
    if to is not None and to not in WRITERS:
        raise UserError(f"--to {to!r}{did_you_mean(to, WRITERS)}; there are: {', '.join(WRITERS)}")
    settings, rule = scan.settings(), rule or scan.rule()
    actions = dict.fromkeys((KEEP, REPAIR, DROP), 0)
    with atomic_folder(target) as folder:
        written = skipped = 0
        with pq.ParquetWriter(folder / "manifest.parquet", MANIFEST) as writer:
            for table in _decided(scan, rule):
                writer.write_table(table)
                for name in actions:
                    actions[name] += table["action"].to_pylist().count(name)
            for table in _skipped(scan):
                writer.write_table(table)
                skipped += len(table)
        if to is not None:
            sink = WRITERS[to](folder)
            for unit, pairs in _mended(scan, settings, folder / "manifest.parquet"):
                written += sink.write(unit, pairs)
            sink.close()
        about = {"scan": str(scan.folder), "rule": rule.as_dict(), "to": to}
        write_json(folder / "repair.json", about | {"actions": actions, "skipped": skipped, "written": written})
    data = None if to is None else target / WRITERS[to].PLACE
    return Repaired(target / "manifest.parquet", actions, skipped, written, data)


def _decided(scan: Scan, rule: Rule) -> Iterator[pa.Table]:
    """The manifest, a batch at a time."""
    for batch in scan.batches(COLUMNS):
        if batch["lie"].null_count:
            raise UserError(f"{scan.folder / ROWS}: damaged (a pair without `lie`)")
        levels = [batch[name].to_numpy(zero_copy_only=False).astype(float) for name in LEVELS]
        action = rule.decide(*levels)
        mended = pa.array(action == REPAIR)
        columns = {
            "key": batch["key"],
            "unit": batch["unit"],
            "action": pa.array(action.tolist(), pa.string()),
            "caption": batch["caption"],
            "new_caption": pc.if_else(mended, batch["best_caption"], None),
            "new_caption_key": pc.if_else(mended, batch["best_key"], None),
            "lie": batch["lie"],
            "sha256": batch["sha256"],
        }
        yield pa.table(columns, schema=MANIFEST)


def _skipped(scan: Scan) -> Iterator[pa.Table]:
    """The manifest's rows of what the scan skipped, a batch at a time: dropped, each key once, nothing else known.

    Whoever trains on the source meets these pairs again, perhaps as usable ones (he has other limits). Eight bytes a
    skipped pair are held.
    """
    parts = [hash_keys(keys) for keys in _skipped_keys(scan)]
    left = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    for batch in scan.batches(["key"]) if len(left) else ():  # a key's bad twin: the key was judged
        left = left[~np.isin(left, hash_keys(batch["key"].to_pylist()))]
    for keys in _skipped_keys(scan):
        hashes = hash_keys(keys)
        new = np.isin(hashes, left) & first_of_each(hashes)
        left = left[~np.isin(left, hashes)]
        named = pa.array(keys, pa.large_string()).filter(pa.array(new))
        columns = {"key": named, "action": pa.array([DROP] * len(named), pa.string())}
        yield pa.table([columns.get(field.name, pa.nulls(len(named), field.type)) for field in MANIFEST], MANIFEST)


def _skipped_keys(scan: Scan) -> Iterator[list[str]]:
    """Keys of `skipped.parquet`, a batch at a time, without second pairs of a key: the first was judged or listed."""
    for batch in scan.batches(["key", "reason"], SKIPPED):
        yield batch["key"].filter(pc.not_equal(batch["reason"], "duplicate key")).to_pylist()


def _mended(scan: Scan, settings: dict[str, Any], manifest: Path) -> Iterator[tuple[str, Iterator[Mended]]]:
    """Unit by unit, the pairs that stay, under the captions in force."""
    try:
        limits = Limits(**settings["limits"])
        read = ReadOptions(**(settings["read"] | {"limits": limits}))
    except TypeError:
        raise UserError(f"{scan.folder}: scan.json is damaged, its limits or its reader's options are none") from None
    units = {unit.name: unit for unit in find_units(settings["source"], settings["dataset_type"], scan.folder, read)}
    for name, rows in _by_unit(manifest):
        if name not in units:
            raise UserError(f"{scan.folder}: the scan's shard {name} is not there any more")
        yield name, _pairs(units[name], rows, limits)


def _by_unit(manifest: Path) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Unit -> key -> row, one unit at a time: rows of a unit lie together. Pairs that were not judged have none."""
    name = ""
    rows: dict[str, dict[str, Any]] = {}
    with pq.ParquetFile(manifest) as file:
        for batch in file.iter_batches():
            for row in batch.filter(pc.is_valid(batch["unit"])).to_pylist():
                if row["unit"] != name and rows:
                    yield name, rows
                    rows = {}
                name = row["unit"]
                rows[row["key"]] = row
    if rows:
        yield name, rows


def _pairs(unit: Unit, rows: dict[str, dict[str, Any]], limits: Limits) -> Iterator[Mended]:
    found: set[str] = set()
    for item in track(unit.pairs(lambda skipped: None, limits, fields=True), unit.name, len(rows)):
        row = rows.get(item.pair.key)
        if row is None or item.pair.key in found:
            continue  # bad, or a key given twice: the scan did not judge it
        if row["caption"] != item.pair.caption or row["sha256"] != hashlib.sha256(item.pair.image).hexdigest():
            continue  # the key's bad twin; where no pair is the one that was judged, the count below tells
        found.add(item.pair.key)
        if row["action"] == KEEP:
            yield Mended(item, item.pair.caption, None)
        elif row["action"] == REPAIR:
            yield Mended(item, row["new_caption"], item.pair.caption)
    if len(found) < len(rows):
        raise UserError(f"{unit.source}: {len(rows) - len(found)} pairs of the scan are gone or changed; scan it again")
