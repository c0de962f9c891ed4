"""What every reader of a format is given and gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from otcclip.data.atomic import disk_errors
from otcclip.data.decode import DEFAULT_LIMITS, Limits, decode_caption
from otcclip.data.shards import Skipped
from otcclip.data.table import Row


@dataclass(frozen=True)
class ReadOptions:
    """How to read a source.

    Attributes:
        img_key, caption_key: column names (CSV, Parquet, HF); None: the format's usual ones.
        separator: of a CSV file.
        image_root: folder that relative image paths start from; None: the format's usual place.
        crop_regions: Visual Genome: each phrase with its own region, instead of with the whole image.
        limits: caps on what a pair may ask of us.
    """

    img_key: str | None = None
    caption_key: str | None = None
    separator: str = "\t"
    image_root: str | None = None
    crop_regions: bool = False
    limits: Limits = DEFAULT_LIMITS


class Spool:
    """A file that images go to whose own container cannot be read at random (Parquet pages are compressed)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: IO[bytes] | None = None

    def add(self, data: bytes) -> tuple[int, int]:
        """Append; returns offset and size. Raises UserError on a full disk: it is not the source that fails."""
        with disk_errors(self.path):
            if self._handle is None:
                self._handle = self.path.open("wb")
            offset = self._handle.tell()
            self._handle.write(data)
            return offset, len(data)

    def close(self) -> None:
        if self._handle is not None:
            with disk_errors(self.path):
                self._handle.close()


class Reader(Protocol):
    """Yields a `Row` for every pair of `source` in its order, a `Skipped` for every bad one. No image is decoded here.

    Raises:
        UserError: the source is missing, damaged or not of this format.
    """

    def __call__(self, source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]: ...


def caption_of(text: str, limits: Limits) -> str:
    """A caption that came as text, held to the same rules as one from a shard. Raises BadPair."""
    return decode_caption(text.encode("utf-8", "surrogateescape"), limits)


class Occurrences:
    """Keys for pairs known by their image alone: `name`, then `name#1`, `name#2` for further captions of it."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def key(self, name: str) -> str:
        count = self._seen.get(name, 0)
        self._seen[name] = count + 1
        return f"{name}#{count}" if count else name
