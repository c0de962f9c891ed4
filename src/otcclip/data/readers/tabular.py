"""Columns of images and captions: Parquet files, and Hugging Face data sets saved to disk.

Both are read with pyarrow alone. Image columns may hold bytes, Hugging Face's `{bytes, path}`, or paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.decode import BadPair, printable
from otcclip.data.readers.base import Occurrences, ReadOptions, Spool, caption_of
from otcclip.data.shards import Skipped
from otcclip.data.table import Row
from otcclip.errors import UserError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "filepath", "image_path", "path")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "TEXT")
LABEL_COLUMNS = ("label_name", "class_name", "label")
KEY_COLUMNS = ("key", "__key__", "id", "uid")


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
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{printable(str(file))}: not a readable Parquet file: {error}") from error


def hf(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """A data set as `datasets.Dataset.save_to_disk` left it: `state.json` and Arrow streams.

    The streams are not compressed, so an image is a place in the file and nothing is copied.
    """
    del spool
    folder = Path(source)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise UserError(f"{source}: holds several splits; name one, for instance {folder / (splits or ['train'])[0]}")
    try:
        names = [str(entry["filename"]) for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{source}: not a Hugging Face data set saved to disk (no state.json with its files)"
        ) from error
    keys = Occurrences()
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{source}: state.json names a file outside its folder: {printable(name)!r}")
        try:
            with pa.memory_map(str(folder / name)) as mapped:
                start = mapped.read_buffer(mapped.size()).address
                mapped.seek(0)
                for batch in pa.ipc.open_stream(mapped):
                    columns = _Columns(batch, str(folder / name), options, keys)
                    yield from columns.rows(None, start, mapped.size())
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{printable(str(folder / name))}: not a readable Arrow stream: {error}") from error


class _Columns:
    """One batch of rows, its columns found by name."""

    def __init__(self, batch: pa.RecordBatch, file: str, options: ReadOptions, keys: Occurrences) -> None:
        self.batch, self.file, self.options, self.seen = batch, file, options, keys
        self.image = self._column(options.img_key, IMAGE_COLUMNS, "--csv-img-key")
        self.captions = self._text(self._column(options.caption_key, CAPTION_COLUMNS, "--csv-caption-key"))
        self.keys = self._text(self._named(KEY_COLUMNS))
        self.labels = self._text(self._named(LABEL_COLUMNS))
        self.paths: list[str | None] | None = None
        if pa.types.is_struct(self.image.type):
            fields = {self.image.type.field(i).name: i for i in range(self.image.type.num_fields)}
            if "bytes" not in fields:
                raise UserError(f"{printable(file)}: an image column without bytes")
            flat = self.image.flatten()
            self.paths = flat[fields["path"]].to_pylist() if "path" in fields else None
            self.image = flat[fields["bytes"]]
        elif pa.types.is_string(self.image.type) or pa.types.is_large_string(self.image.type):
            self.paths, self.image = self.image.to_pylist(), pa.nulls(len(batch), pa.binary())
        if not (pa.types.is_binary(self.image.type) or pa.types.is_large_binary(self.image.type)):
            raise UserError(f"{printable(file)}: images are {self.image.type}, expected bytes, paths or both")

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
                caption = caption_of(self._caption(i), self.options.limits)
                where, offset, length = self._place(i, spool, base, offsets)
            except BadPair as bad:
                yield Skipped(key, self.file, bad.reason)
                continue
            yield Row(key, caption, where, offset, length, self.labels[i])

    def _place(self, i: int, spool: Spool | None, base: int, offsets: list[int]) -> tuple[str, int, int]:
        if not self.image.is_valid()[i].as_py():
            path = self.paths[i] if self.paths is not None else None
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
        own = self.keys[i]
        if own is None and self.paths is not None:
            own = self.paths[i]
        return self.seen.key(own if own is not None else f"{Path(self.file).stem}-row")

    def _caption(self, i: int) -> str:
        caption = self.captions[i]
        if caption is None:
            raise BadPair("no caption")
        return caption

    def _named(self, names: tuple[str, ...]) -> pa.Array | None:
        return next((self.batch.column(name) for name in names if name in self.batch.schema.names), None)

    def _column(self, asked: str | None, usual: tuple[str, ...], flag: str) -> pa.Array:
        found = self._named((asked,) if asked else usual)
        if found is None:
            names = ", ".join(map(repr, self.batch.schema.names))
            raise UserError(f"{printable(self.file)}: no column {asked or usual[0]!r} ({flag}); there are: {names}")
        return found

    def _text(self, column: pa.Array | None) -> list[str | None]:
        if column is None:
            return [None] * len(self.batch)
        return [None if value is None else str(value) for value in column.to_pylist()]
