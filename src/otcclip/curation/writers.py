"""What a repaired data set is written as, one class a format. Images keep their bytes, and captions that were replaced
stay beside the new ones.

wds           tar shards, one a unit; the json as it came, and a re-paired pair's with `original_caption`
csv           pairs.csv (tab, filepath/title as open_clip reads it) and images/ under numbered names
parquet       pairs/, one Parquet a unit: key, caption, image, label, original_caption
datacomp-npy  uids.npy: the pairs kept as they came, as DataComp's resharder takes it; it cannot re-pair
hf            a Hugging Face dataset on disk (extra `[hf]`)
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.curation.units import Item
from otcclip.data.decode import image_kind, printable
from otcclip.data.pairs import Pair
from otcclip.data.shards import write_shard
from otcclip.errors import UserError


@dataclass(frozen=True)
class Mended:
    """A pair that stays: under `caption`; `original` is what it came with, where that differs."""

    item: Item
    caption: str
    original: str | None


class Writer(Protocol):
    """Takes a folder to write into. `PLACE` is what in it is the new data set, as a reader takes it."""

    PLACE: str

    def __init__(self, folder: Path) -> None: ...

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        """Write a unit's pairs; returns how many."""
        ...

    def close(self) -> None: ...


def _whole(mended: Mended) -> bytes:
    if mended.item.box is not None:
        raise UserError("--to: pairs about a region of an image have no file of their own; write a manifest instead")
    return mended.item.pair.image


def _in_shard(mended: Mended) -> Pair:
    pair = mended.item.pair
    kept = {} if mended.original is None else {"original_caption": mended.original}
    return replace(pair, image=_whole(mended), caption=mended.caption, metadata={**pair.metadata, **kept})


class WebDatasetWriter:
    """`NAME.tar`, the same bytes each time."""

    PLACE = "."

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        return write_shard(self.folder / f"{unit}.tar", map(_in_shard, pairs), image_extension=None)

    def close(self) -> None:
        """Nothing is open."""


class CsvWriter:
    """Names of image files are numbers: a key is a stranger's text and no path."""

    PLACE = "pairs.csv"

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        (folder / "images").mkdir()
        self.handle = (folder / "pairs.csv").open("w", encoding="utf-8", newline="")
        self.rows = csv.writer(self.handle, delimiter="\t")
        self.rows.writerow(["filepath", "title", "key", "original_caption"])

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        before = self.count
        for mended in pairs:
            image = _whole(mended)
            name = f"images/{self.count:09d}.{image_kind(image) or 'png'}"
            (self.folder / name).write_bytes(image)
            self.rows.writerow([name, mended.caption, mended.item.pair.key, mended.original or ""])
            self.count += 1
        return self.count - before

    def close(self) -> None:
        self.handle.close()


class ParquetWriter:
    """`pairs/NAME.parquet`, 1,000 pairs a row group. A folder of its own: readers take every Parquet file of a folder,
    and the manifest, which holds no pairs, lies outside."""

    PLACE = "pairs"
    SCHEMA = pa.schema(
        [
            ("key", pa.string()),
            ("caption", pa.string()),
            ("image", pa.binary()),
            ("label", pa.string()),
            ("original_caption", pa.string()),
        ]
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder / self.PLACE
        self.folder.mkdir()

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        count, held = 0, []
        with pq.ParquetWriter(self.folder / f"{unit}.parquet", self.SCHEMA) as writer:
            for mended in pairs:
                held.append(row(mended))
                count += 1
                if len(held) == 1000:
                    writer.write_table(pa.Table.from_pylist(held, self.SCHEMA))
                    held = []
            if held:
                writer.write_table(pa.Table.from_pylist(held, self.SCHEMA))
        return count

    def close(self) -> None:
        """Nothing is open."""


def row(mended: Mended) -> dict[str, Any]:
    pair = mended.item.pair
    return {
        "key": pair.key,
        "caption": mended.caption,
        "image": _whole(mended),
        "label": pair.label,
        "original_caption": mended.original,
    }


class DataCompWriter:
    """`uids.npy`: sorted, each uid's 32 hex digits as two uint64 (DataComp, arXiv 2304.14108, its subset files)."""

    PLACE = "uids.npy"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uids: list[tuple[int, int]] = []

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        count = 0
        for mended in pairs:
            uid = mended.item.pair.metadata.get("uid", mended.item.pair.key)
            if len(uid) != 32 or set(uid.lower()) - set("0123456789abcdef"):
                raise UserError(f"--to datacomp-npy: pair {printable(uid)[:60]!r} has no uid of 32 hex digits")
            if mended.original is None:
                self.uids.append((int(uid[:16], 16), int(uid[16:], 16)))
                count += 1
        return count

    def close(self) -> None:
        np.save(self.folder / "uids.npy", np.sort(np.array(self.uids, dtype="u8,u8")), allow_pickle=False)


class HfWriter:
    """`dataset/` as `datasets.load_from_disk` reads it."""

    PLACE = "dataset"

    def __init__(self, folder: Path) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError("--to hf: needs the package `datasets`: pip install 'otcclip[hf]'") from None
        self.folder, self.datasets = folder, datasets
        self.parts: list[Any] = []
        self.inner = ParquetWriter(folder)

    def write(self, unit: str, pairs: Iterator[Mended]) -> int:
        self.parts.append(self.inner.folder / f"{unit}.parquet")
        return self.inner.write(unit, pairs)

    def close(self) -> None:
        files = [str(path) for path in self.parts]
        cache = self.folder / ".cache"
        made = self.datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
        made.cast_column("image", self.datasets.Image()).save_to_disk(str(self.folder / self.PLACE))
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(self.inner.folder)


WRITERS: Mapping[str, type[Any]] = {
    "wds": WebDatasetWriter,
    "csv": CsvWriter,
    "parquet": ParquetWriter,
    "datacomp-npy": DataCompWriter,
    "hf": HfWriter,
}
