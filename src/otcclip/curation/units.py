"""The units of a scan: what is read, encoded, scored and written as one piece, and retried as one piece.

A tar shard is a unit. Sources that have no shards (CSV, Parquet, COCO, ...) are indexed once and cut every 4,096 rows.
The index stands for the source from then on, so it is refused where the source is not what was indexed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from otcclip.data.atomic import disk_errors, write_json
from otcclip.data.decode import DEFAULT_LIMITS, BadPair, Box, Limits, printable
from otcclip.data.images import Gone, read_bytes
from otcclip.data.index import fingerprint
from otcclip.data.pairs import Pair
from otcclip.data.readers import ReadOptions, Spool, find_reader
from otcclip.data.shards import Skipped, expand_shards, locate_pairs
from otcclip.data.store import write_skipped
from otcclip.data.table import PairTable, Row, TableBuilder
from otcclip.errors import UserError

ROWS = 4096
INDEX, SPOOL, INDEXED, INDEX_SKIPPED = "index.arrow", "index.bin", "index.json", "index-skipped"


@dataclass(frozen=True)
class Unit:
    """One piece of the source.

    Attributes:
        name: unique in the scan, safe as a file's name.
        source: the shard's path or URL, or the index file.
        rows: the rows of the index that it is, or None for a shard.
    """

    name: str
    source: str
    rows: tuple[int, int] | None = None

    def pairs(
        self, on_skip: Callable[[Skipped], None], limits: Limits = DEFAULT_LIMITS, fields: bool = False
    ) -> Iterator[Item]:
        """The unit's pairs, images still encoded; with `fields` those of a shard carry their json member whole.

        Raises:
            UserError: the shard is missing, truncated or damaged.
        """
        if self.rows is None:
            for found in locate_pairs(self.source, limits=limits, on_skip=on_skip, images=True, fields=fields):
                yield Item(found.pair, (found.offset, found.size))
            return
        table = PairTable.open(Path(self.source))
        for i in range(*self.rows):
            row = table[i]
            try:
                yield Item(Pair(row.key, read_bytes(row, limits), row.caption, row.label), (i, row.size), row.box)
            except BadPair as bad:
                on_skip(Skipped(row.key, row.file, bad.reason))
            except Gone as gone:
                raise UserError(str(gone)) from None

    def images(
        self, places: Sequence[tuple[int, int]], sha256: Sequence[str], limits: Limits = DEFAULT_LIMITS
    ) -> Iterator[tuple[bytes, Box | None]]:
        """Some pairs' encoded images again, with their regions, by `Item.at`: nothing else of the unit is read.

        Args:
            sha256: hex digests that the images had.

        Raises:
            UserError: an image is gone or is not what it was.
        """
        table = None if self.rows is None else PairTable.open(Path(self.source))
        for at, digest in zip(places, sha256, strict=True):
            row = Row("", "", self.source, *at) if table is None else table[at[0]]
            try:
                data = read_bytes(row, limits)
            except (BadPair, Gone) as gone:
                raise UserError(f"{row.file}: changed since it was scanned ({gone})") from None
            if hashlib.sha256(data).hexdigest() != digest:
                raise UserError(f"{row.file}: changed since it was scanned; scan it again into another folder")
            yield data, row.box


@dataclass(frozen=True)
class Item:
    """A pair, and the region of its image that it is about, where it is about one.

    Attributes:
        at: where its image lies in the unit: first byte and size in a shard, or row and size in the index.
    """

    pair: Pair
    at: tuple[int, int]
    box: Box | None = None


def find_units(
    source: str | Path | Sequence[str | Path], dataset_type: str, folder: Path, options: ReadOptions | None = None
) -> tuple[Unit, ...]:
    """The units of `source`; an index for formats without shards is made in `folder` (once).

    Raises:
        UserError: nothing there, an unknown format, a damaged source, or one that changed since it was indexed.
    """
    items = [str(source)] if isinstance(source, str | Path) else [str(item) for item in source]
    path = folder / INDEX
    if not path.is_file():  # where it is, the format is known, and the source may not be seen from here
        name = _format(items, dataset_type)
        if name == "webdataset" or (name == "img2dataset" and any(Path(items[0]).glob("*.tar"))):
            shards = expand_shards([part for item in items for part in item.split("::")])
            return tuple(Unit(_name(i, shard), shard) for i, shard in enumerate(shards))
        _index(items[0], name, folder, options or ReadOptions())
    _check_unchanged(items[0], folder)
    n = len(PairTable.open(path))
    if n == 0:
        raise UserError(f"{printable(items[0])}: holds no usable pair")
    return tuple(Unit(f"rows-{a:09d}", str(path), (a, min(a + ROWS, n))) for a in range(0, n, ROWS))


def _format(items: Sequence[str], dataset_type: str) -> str:
    if len(items) == 1:
        return find_reader(dataset_type, items[0])[0]
    if dataset_type not in ("auto", "webdataset"):
        raise UserError(f"--dataset-type {dataset_type}: takes one source, {len(items)} were named")
    return "webdataset"


def _check_unchanged(source: str, folder: Path) -> None:
    """Raises UserError where the source is there and is not what was indexed, or where that is not known.

    A source that is not there is not missed: a scan's folder may have been taken elsewhere with its index and spool.
    """
    try:
        indexed = json.loads((folder / INDEXED).read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        why = f"{INDEXED} beside its index is missing or damaged, so nobody knows whether it changed"
        raise UserError(f"{printable(source)}: {why}; name another --out and scan it again") from None
    if os.access(source, os.F_OK) and _fingerprint(source) != indexed:
        raise UserError(f"{printable(source)}: changed since it was indexed; name another --out and scan it again")


def _fingerprint(source: str) -> str:
    return hashlib.sha256(json.dumps(fingerprint([source])).encode()).hexdigest()


def _index(source: str, name: str, folder: Path, options: ReadOptions) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    skipped: list[Skipped] = []
    making = folder / f".{SPOOL}.{os.getpid()}-{secrets.token_hex(4)}"  # jobs that share the folder may all be here
    spool = Spool(making)
    before = _fingerprint(source)  # a change while it is read will show

    def rows() -> Iterator[Row]:
        for row in find_reader(name, source)[1](source, options, spool):
            if isinstance(row, Skipped):
                skipped.append(row)
            else:
                yield row

    try:
        table = TableBuilder().extend(rows()).build().beside(making, SPOOL)
        spool.close()
        if making.exists():
            with disk_errors(making):
                making.replace(folder / SPOOL)
    finally:
        spool.close()
        making.unlink(missing_ok=True)
    write_skipped(folder / "skipped" / f"{INDEX_SKIPPED}.parquet", skipped)
    write_json(folder / INDEXED, {"fingerprint": before})
    table.save(folder / INDEX)


def _name(place: int, shard: str) -> str:
    """`00007-tail-of-the-name`: the place makes it unique, the tail lets people find it."""
    tail = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(shard).stem)[-40:]
    return f"{place:05d}-{tail}"


def share(units: Sequence[Unit], index: int, count: int) -> tuple[Unit, ...]:
    """Every `count`-th unit from `index` on: one job's part."""
    return tuple(units[index::count])
