"""Images by number: held decoded, or decoded when asked for. Both answer `images[index]`, `len` and `split`.

A decoded corpus is a plain tensor, in memory or memory-mapped; `DecodedOnDemand` stands in its place where there is no
room for one (CC3M at 224 px is 450 GB decoded).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import fsspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from otcclip.data.decode import DEFAULT_LIMITS, BadPair, Limits, Reason, decode_image, printable
from otcclip.data.table import WHOLE_FILE, PairTable, Row
from otcclip.errors import UserError

OPEN_FILES = 256


class ImageSource(Protocol):
    """What a defence and the loop may ask of a corpus's images. A tensor `[n, ...]` uint8 fits."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor:
        """The samples at `index [b]` int64: `[b, ...]` uint8."""
        ...

    def split(self, split_size: int) -> Sequence[Tensor] | Iterator[Tensor]:
        """All samples in order, `split_size` at a time."""
        ...


def fetch(images: Tensor | ImageSource, indices: Sequence[Tensor]) -> Iterator[Tensor]:
    """`images[index]` for each of `indices`, read ahead where the images are not at hand."""
    if isinstance(images, Chosen):
        yield from fetch(images.images, [images.rows[index] for index in indices])
    elif isinstance(images, DecodedOnDemand):
        yield from images.batches(indices)
    else:
        for index in indices:
            yield images[index]


class Chosen:
    """Some of a source's images, `rows [n]` int64, as a source of their own; nothing is copied."""

    def __init__(self, images: Tensor | ImageSource, rows: Tensor) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.images[self.rows[index]]

    def split(self, split_size: int) -> Iterator[Tensor]:
        yield from fetch(self.images, self.rows.split(split_size))


class Gone(Exception):
    """Bytes that an index promised are not there (any more)."""


def read_bytes(row: Row, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """A pair's encoded image.

    A file of its own (`row.size` WHOLE_FILE) is named by the data set, a stranger, and must be a local one: an address
    (`://`) there is never opened, since it could ask for the network, wait for ever or open archives in archives.
    Shards are named by the user and may be fsspec addresses.

    Raises:
        BadPair: a file of its own is missing, an address, not a regular file, or larger than the cap.
        Gone: a shard is missing, shorter than indexed, or cannot be read.
    """
    if row.size == WHOLE_FILE:
        return _whole(row.file, limits)
    if "://" in row.file:
        data = _remote(row.file, row.offset, row.offset + row.size)
    else:
        try:
            data = os.pread(_descriptor(row.file), row.size, row.offset)
        except OSError as error:
            raise Gone(f"{printable(row.file)}: {error.strerror}") from error
    if len(data) < row.size:
        raise Gone(f"{printable(row.file)}: shorter than it was when indexed")
    return data


def _whole(path: str, limits: Limits) -> bytes:
    if "://" in path:
        raise BadPair("no image")
    try:
        # A name in a data set may be a pipe or a device; opening one could wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise BadPair("not a regular file")
        with open(path, "rb") as handle:  # noqa: PTH123
            data = handle.read(limits.member_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadPair("no image") from error
    if len(data) > limits.member_bytes:
        raise BadPair("member too large")
    return data


def _remote(url: str, start: int, stop: int) -> bytes:
    try:
        files, path = fsspec.core.url_to_fs(url)
        return bytes(files.cat_file(path, start=start, end=stop))
    except Exception as error:
        # Each of fsspec's file systems has errors of its own, and some fail by TypeError or AttributeError.
        raise Gone(f"{printable(url)}: {printable(str(error)) or type(error).__name__}") from error


class _Open:
    """A file descriptor that closes with its last reference; `pread` leaves its position alone, so forks share it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, device: int, inode: int) -> _Open:
    del device, inode  # a file put in this one's place is another file
    return _Open(path)


def _descriptor(path: str) -> int:
    found = os.stat(path)  # noqa: PTH116
    return _opened(path, found.st_dev, found.st_ino).number


@dataclass(frozen=True)
class Decoded:
    """What a worker made of a batch: `images [g, H, W, 3]` uint8 of the good rows, `bad` (place in batch, reason)."""

    images: Tensor
    good: tuple[int, ...]
    bad: tuple[tuple[int, Reason], ...]
    gone: str = ""


class _Batches(Dataset[Decoded]):
    def __init__(self, table: PairTable, size: int, limits: Limits) -> None:
        self.table, self.size, self.limits = table, size, limits

    def __getitem__(self, rows: Tensor) -> Decoded:
        images, good, bad = [], [], []
        for place, number in enumerate(rows.tolist()):
            row = self.table[number]
            try:
                images.append(decode_image(read_bytes(row, self.limits), self.size, self.limits, row.box))
                good.append(place)
            except BadPair as error:
                bad.append((place, error.reason))
            except Gone as error:
                return Decoded(torch.empty(0), (), (), str(error))
        stacked = np.stack(images) if images else np.empty((0, self.size, self.size, 3), np.uint8)
        return Decoded(torch.from_numpy(stacked), tuple(good), tuple(bad))


class DecodedOnDemand:
    """Images of a table, `[n, 3, size, size]` uint8, decoded when asked for; `ImageSource`.

    Args:
        workers: processes that decode ahead; 0 decodes in this one.
        ahead: batches a worker holds ready.
    """

    def __init__(
        self, table: PairTable, size: int, *, workers: int = 0, ahead: int = 2, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.table, self.size, self.workers, self.ahead = table, size, workers, ahead
        self._batches = _Batches(table, size, limits)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._whole(self._batches[torch.arange(len(self))[index]])

    def split(self, split_size: int) -> Iterator[Tensor]:
        yield from self.batches(list(torch.arange(len(self)).split(split_size)))

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """`[b, 3, size, size]` for each of `indices`, in order, decoded ahead by the workers.

        Raises:
            UserError: a shard vanished or an image changed since it was indexed, or a worker was killed.
        """
        for decoded in self.decoded(indices):
            yield self._whole(decoded)

    def decoded(self, indices: Sequence[Tensor]) -> Iterator[Decoded]:
        """As `batches`, with what is bad told instead of raised."""
        loader = DataLoader(
            self._batches,
            batch_size=None,
            sampler=indices,
            num_workers=self.workers,
            prefetch_factor=self.ahead if self.workers else None,
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                raise UserError(
                    f"a data worker was killed ({str(error).splitlines()[0]}); out of memory? Fewer --workers, then "
                    "the same command with --resume latest"
                ) from error
            raise

    def _whole(self, decoded: Decoded) -> Tensor:
        if decoded.gone:
            raise UserError(f"{decoded.gone}; put it back, then the same command with --resume latest goes on")
        if decoded.bad:
            reason = decoded.bad[0][1]
            raise UserError(f"an image that could be decoded when indexed no longer can ({reason}): the data changed")
        return decoded.images.permute(0, 3, 1, 2)
