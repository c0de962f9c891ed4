"""Columns of images and captions: Parquet files, and Hugging Face data sets saved to disk.

Both are read with pyarrow alone. Image columns may hold bytes, Hugging Face's `{bytes, path}`, or paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.decode import BadPair, decode_caption, printable
from otcclip.data.readers.base import Occurrences, ReadOptions, Spool
from otcclip.data.shards import Skipped
from otcclip.data.table import Row
from otcclip.errors import UserError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "filepath", "image_path", "path")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "TEXT")
LABEL_COLUMNS = ("label_name", "class_name", "label")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
# What pyarrow raises on crafted files; ValueError: names of columns that are not UTF-8, a date past any calendar.
_UNREADABLE = (OSError, ValueError, OverflowError, pa.ArrowException)


def parquet(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """One Parquet file or a folder of them (also `img2dataset --output_format parquet`).

    Image bytes are copied to `spool` once: Parquet pages are compressed and cannot be read at random.
    """
    path = Path(source)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{source}: no .parquet file in this folder")
    keys = Occurrences()
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=1024):
                    yield from _Columns(batch, str(file), options, keys).rows(spool)
        except _UNREADABLE as error:
            raise UserError(f"{printable(str(file))}: not a readable Parquet file: {printable(str(error))}") from error


def hf(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """A data set as `datasets.Dataset.save_to_disk` left it: `state.json` and Arrow streams.

    The streams are not compressed, so an image is a place in the file and nothing is copied.
    """
    del spool
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        raise UserError(f"{printable(source)}: holds several splits; name one, for instance {_a_split(folder)}")
    try:
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{printable(source)}: not a Hugging Face data set saved to disk (no state.json with its files)"
        ) from error
    keys = Occurrences()
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{printable(source)}: state.json names a file outside its folder: {printable(name)!r}")
        try:
            if not (folder / name).is_file():  # a pipe would be waited for
                raise FileNotFoundError("no such file")
            with pa.memory_map(str(folder / name)) as mapped:
                start = mapped.read_buffer(mapped.size()).address
                mapped.seek(0)
                for batch in pa.ipc.open_stream(mapped):
                    columns = _Columns(batch, str(folder / name), options, keys)
                    yield from columns.rows(None, start, mapped.size())
        except _UNREADABLE as error:
            raise UserError(
                f"{printable(str(folder / name))}: not a readable Arrow stream: {printable(str(error))}"
            ) from error


def _a_split(folder: Path) -> str:
    path = folder / "dataset_dict.json"
    try:
        splits = json.loads(path.read_text("utf-8"))["splits"] or ["train"]
        if not isinstance(splits, list) or not isinstance(splits[0], str):
            raise TypeError("splits is no list of names")
        return printable(str(folder / splits[0]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{printable(str(path))}: does not list the splits of a Hugging Face data set") from error


class _Columns:
    """One batch of rows, its columns found by name. Whoever made it may have written any offsets: each column that is
    used is checked in full before a byte of it is touched, or a crafted one ends the process (SIGBUS)."""

    def __init__(self, batch: pa.RecordBatch, file: str, options: ReadOptions, keys: Occurrences) -> None:
        batch.validate()
        self.batch, self.file, self.options, self.seen = batch, file, options, keys
        image = self._column(options.img_key, IMAGE_COLUMNS, "--csv-img-key")
        captions = self._column(options.caption_key, CAPTION_COLUMNS, "--csv-caption-key")
        self.captions = self._text(captions, "captions")
        self.keys = self._text(self._named(KEY_COLUMNS))
        self.labels = [_readable(label) for label in self._text(self._named(LABEL_COLUMNS))]
        self.image, self.paths = self._images(image)
        self.present = self.image.is_valid().to_pylist()

    def _images(self, image: pa.Array) -> tuple[pa.Array, list[bytes | None]]:
        """The column of bytes, and that of paths."""
        n, paths = len(self.batch), None
        if pa.types.is_struct(image.type):
            fields = {image.type.field(i).name: i for i in range(image.type.num_fields)}
            if "bytes" not in fields:
                raise UserError(f"{printable(self.file)}: an image column without bytes")
            flat = image.flatten()
            image, paths = flat[fields["bytes"]], flat[fields["path"]] if "path" in fields else None
        elif pa.types.is_string(image.type) or pa.types.is_large_string(image.type):
            image, paths = pa.nulls(n, pa.binary()), image
        if not (pa.types.is_binary(image.type) or pa.types.is_large_binary(image.type)):
            raise UserError(f"{printable(self.file)}: images are {image.type}, expected bytes, paths or both")
        image.validate(full=True)
        return image, self._text(paths, "paths of images")

    def rows(self, spool: Spool | None, start: int = 0, size: int = 0) -> Iterator[Row | Skipped]:
        offsets = self._offsets()
        base = 0
        if spool is None and len(self.batch) and (data := self.image.buffers()[2]) is not None:
            base = data.address - start
            if not 0 <= base <= size - data.size:
                raise UserError(f"{printable(self.file)}: compressed Arrow; save it again without compression")
        for i in range(len(self.batch)):
            key = self._key(i)
            try:
                caption = self._caption(i)
                where, offset, length = self._place(i, spool, base, offsets)
            except BadPair as bad:
                yield Skipped(key, self.file, bad.reason)
                continue
            yield Row(key, caption, where, offset, length, self.labels[i])

    def _place(self, i: int, spool: Spool | None, base: int, offsets: list[int]) -> tuple[str, int, int]:
        if not self.present[i]:
            path = os.fsdecode(self.paths[i] or b"")
            if not path or "\0" in path:
                raise BadPair("no image")
            return (path if "://" in path else str(Path(self.options.image_root or ".") / path)), 0, -1
        length = offsets[i + 1] - offsets[i]
        if length > self.options.limits.member_bytes:
            raise BadPair("member too large")
        if spool is None:
            return self.file, base + offsets[i], length
        return (str(spool.path), *spool.add(self.image[i].as_py()))

    def _offsets(self) -> list[int]:
        """`n + 1` places in the column's data buffer."""
        kind = np.int64 if pa.types.is_large_binary(self.image.type) else np.int32
        if not len(self.image) or (raw := self.image.buffers()[1]) is None:
            return [0] * (len(self.image) + 1)
        places = np.frombuffer(raw, kind)
        return [int(i) for i in places[self.image.offset : self.image.offset + len(self.image) + 1]]

    def _key(self, i: int) -> str:
        own = _readable(self.keys[i] if self.keys[i] is not None else self.paths[i])
        return self.seen.key(own if own is not None else f"{Path(self.file).stem}-row")

    def _caption(self, i: int) -> str:
        caption = self.captions[i]
        if caption is None:
            raise BadPair("no caption")
        return decode_caption(caption, self.options.limits)

    def _named(self, names: tuple[str, ...]) -> pa.Array | None:
        found = self.batch.schema.names
        name = next((name for name in names if name in found), None)
        if name is not None and found.count(name) > 1:
            raise UserError(f"{printable(self.file)}: {found.count(name)} columns are called {printable(name)!r}")
        return None if name is None else self.batch.column(name)

    def _column(self, asked: str | None, usual: tuple[str, ...], flag: str) -> pa.Array:
        found = self._named((asked,) if asked else usual)
        if found is None:
            names = ", ".join(repr(printable(name)) for name in self.batch.schema.names[:20])
            raise UserError(f"{printable(self.file)}: no column {asked or usual[0]!r} ({flag}); there are: {names}")
        return found

    def _text(self, column: pa.Array | None, only_text: str = "") -> list[bytes | None]:
        """Text as its bytes: one that is not UTF-8 spoils its pair, not the file. Other values as Python writes them,
        but where the column must be text: `only_text` then names it."""
        if column is None or pa.types.is_null(column.type):
            return [None] * len(self.batch)
        if pa.types.is_dictionary(column.type):
            column.validate(full=True)
            column = column.dictionary_decode()
        if (same := _BYTES.get(column.type)) is not None:
            column = column.view(same)
        elif only_text:
            raise UserError(f"{printable(self.file)}: {only_text} are {column.type}, expected text")
        column.validate(full=True)
        values = column.to_pylist()
        return [value if value is None or isinstance(value, bytes) else str(value).encode() for value in values]


_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
    pa.binary(): pa.binary(),
    pa.large_binary(): pa.large_binary(),
    pa.binary_view(): pa.binary_view(),
}


def _readable(text: bytes | None) -> str | None:
    """Bytes that are no UTF-8 as `\\xff`, so that two keys stay two."""
    return None if text is None else text.decode("utf-8", "backslashreplace")
