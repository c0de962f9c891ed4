"""The index of a data set: a row a pair, saying where its image's bytes lie.

Shards, CSV files and annotation files are read once, front to back, into a `PairTable`. From then on any pair can be
had at random: an epoch is a permutation of row numbers, and a place in it is two numbers (epoch, step). Held as an
Arrow file and memory-mapped, so that worker processes share it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from otcclip.data.atomic import atomic_file
from otcclip.data.decode import Box, printable
from otcclip.errors import UserError

WHOLE_FILE = -1
# Where the file names stand in the schema. Indexes that lack it joined them by newlines, which a path may hold.
FILES = b"otcclip.files.json"
BESIDE = "\0"  # stands before the name of a file in the index's own folder; no path that a data set names may hold it

SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("caption", pa.large_string()),
        ("label", pa.string()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("box", pa.list_(pa.int32(), 4)),
    ]
)


@dataclass(frozen=True)
class Row:
    """One pair of an index.

    Attributes:
        key: stable across shuffles, runs and machines.
        caption: the pair's text.
        file: what holds the image: a shard (path or fsspec URL), or the image itself (a local path).
        offset, size: where the encoded image lies in `file`; WHOLE_FILE: all of it.
        label: class name, for evaluation only.
        box: x, y, width, height in pixels; the pair is about this region alone.
    """

    key: str
    caption: str
    file: str
    offset: int = 0
    size: int = WHOLE_FILE
    label: str | None = None
    box: Box | None = None


class PairTable:
    """`n` rows; columns as in `Row`, `file` held as a number into `files`."""

    def __init__(self, columns: pa.Table, files: Sequence[str], path: Path | None = None) -> None:
        self._columns, self.files, self._path = columns, tuple(files), path

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def __getitem__(self, index: int) -> Row:
        row = self._columns.slice(index, 1).to_pylist()[0]
        box = None if row["box"] is None else (row["box"][0], row["box"][1], row["box"][2], row["box"][3])
        file = self.files[row["file"]]
        return Row(row["key"], row["caption"], file, row["offset"], row["size"], row["label"], box)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._columns["key"].to_pylist())

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(self._columns["caption"].to_pylist())

    @property
    def labels(self) -> tuple[str | None, ...]:
        return tuple(self._columns["label"].to_pylist())

    def caption_numbers(self) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The distinct captions, sorted, and each row's number among them."""
        captions, number = np.unique(np.asarray(self._columns["caption"].to_pylist(), object), return_inverse=True)
        return tuple(str(caption) for caption in captions), number.astype(np.int64)

    def image_numbers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first row of each distinct image (by the place of its bytes), `[m]`, and each row's image, `[n]`."""
        columns = [self._columns[name].to_numpy().astype(np.int64) for name in ("file", "offset", "size")]
        boxes = self._columns["box"].to_pylist()
        columns += [np.array([-1 if box is None else box[i] for box in boxes], np.int64) for i in range(4)]
        _, first, number = np.unique(np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True)
        return first.astype(np.int64), number.reshape(-1).astype(np.int64)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> PairTable:
        """The rows at these numbers, or where this mask `[n]` holds."""
        index = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return PairTable(self._columns.take(pa.array(index)), self.files)

    def with_captions(self, captions: Sequence[str]) -> PairTable:
        """The same pairs under other captions (`[n]`)."""
        place = SCHEMA.get_field_index("caption")
        return PairTable(
            self._columns.set_column(place, SCHEMA.field("caption"), pa.array(captions, pa.large_string())), self.files
        )

    def beside(self, old: Path, name: str) -> PairTable:
        """The same rows, to be saved: the file `old` will be `name` in the index's own folder, wherever that is."""
        return PairTable(self._columns, [BESIDE + name if file == str(old) else file for file in self.files])

    def save(self, path: Path) -> None:
        """Write an Arrow file, whole or not at all. Raises UserError on a full disk."""
        # ASCII: a path may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
        metadata = {FILES: json.dumps(self.files, ensure_ascii=True).encode()}
        table = self._columns.replace_schema_metadata(metadata).combine_chunks()
        with atomic_file(path) as handle, pa.ipc.new_file(handle, table.schema) as writer:
            writer.write_table(table, max_chunksize=1 << 20)

    @classmethod
    def open(cls, path: Path) -> PairTable:
        """Memory-map what `save` wrote; an index opened before that is the same file still is given again.

        Raises:
            UserError: missing, damaged, or of an older form.
        """
        try:
            seen = path.stat()
            return _opened(path, seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            found = printable(str(error))
            raise UserError(f"{path}: not an index of pairs ({found}); delete it and it will be made again") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process opens the file again instead of being sent the columns."""
        if self._path is not None:
            return PairTable.open, (self._path,)
        return PairTable, (self._columns, self.files)


# A scan opens its index for every unit, twice and again for its page; a million file names take a quarter of a second.
@lru_cache(maxsize=4)
def _opened(path: Path, device: int, inode: int, size: int, changed: int) -> PairTable:
    del device, inode, size, changed  # another file under the same name is another table
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    if table.schema.names != SCHEMA.names:
        raise ValueError(f"columns {table.schema.names}")
    files = [str(path.with_name(file[1:])) if file.startswith(BESIDE) else file for file in _files(table.schema)]
    return PairTable(table, files, path)


def _files(schema: pa.Schema) -> list[str]:
    written = (schema.metadata or {}).get(FILES)
    if written is None:
        raise ValueError("made by an older version")
    files = json.loads(written)
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError("its file names are not a list")
    return files


class TableBuilder:
    """Collects rows; columns grow as Arrow chunks, so that a row costs its bytes and no Python object."""

    CHUNK = 1 << 16

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._chunks: list[pa.RecordBatch] = []
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return sum(len(chunk) for chunk in self._chunks) + len(self._rows)

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == self.CHUNK:
            self._flush()

    def extend(self, rows: Iterable[Row]) -> TableBuilder:
        for row in rows:
            self.add(row)
        return self

    def build(self) -> PairTable:
        self._flush()
        return PairTable(pa.Table.from_batches(self._chunks, SCHEMA), list(self._files))

    def _flush(self) -> None:
        number = [self._files.setdefault(row.file, len(self._files)) for row in self._rows]
        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in self._rows] for name in SCHEMA.names}
        columns["file"] = number
        arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
        self._chunks.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        self._rows = []
