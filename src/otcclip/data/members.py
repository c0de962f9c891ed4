"""A tar read as if an enemy had written it: in its order, nothing extracted, no header believed.

Read with the standard library's `tarfile`; its end is checked, its sizes are bounded, and what is no regular file of an
allowed kind is named and never opened.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from otcclip.data.decode import ALLOWED_EXTENSIONS, IMAGE_EXTENSIONS, Limits, Reason, printable
from otcclip.errors import UserError


@dataclass(frozen=True)
class Member:
    """A tar member: its content, or the reason it was not read; where its bytes lie."""

    name: str
    content: bytes | Reason
    offset: int = 0
    size: int = 0


def split_name(name: str) -> tuple[str, str]:
    """Key and extension, webdataset's rule: the first dot of the last component; `./` in front is dropped."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def members_of(shard: str, limits: Limits, images: bool) -> Iterator[Member]:
    """The members of a tar (local path or fsspec URL) in its order; without `images` those are passed over unread.

    Raises:
        UserError: missing, not an (uncompressed) tar, truncated or damaged.
    """
    with _open(shard) as handle:
        bounded = _Bounded(handle, max(limits.member_bytes, 1 << 20) + 1024)
        try:
            # Uncompressed only: a compressed shard could unpack to any size.
            with tarfile.open(
                fileobj=bounded,  # type: ignore[call-overload]
                mode="r:",
                encoding="utf-8",
                errors="backslashreplace",
            ) as tar:
                yield from _walk(tar, limits, images)
                # tarfile takes a header that is cut off or broken for the end; the real end is a block of
                # zeros.
                bounded.seek(tar.offset)
                if bounded.read(512).strip(b"\0") or bounded.tell() - tar.offset < 512:
                    raise tarfile.ReadError("no end-of-archive mark: truncated?")
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{printable(shard)}: cannot read: {printable(error.strerror or str(error))}") from error
        except Exception as error:
            # tarfile raises more than TarError on crafted headers (ValueError, IndexError, ...).
            raise UserError(f"{printable(shard)}: truncated or broken tar shard: {printable(str(error))}") from error


def _walk(tar: tarfile.TarFile, limits: Limits, images: bool) -> Iterator[Member]:
    last = -1
    while (member := tar.next()) is not None:
        if member.offset <= last:  # a negative size sends tarfile back to where it was, for ever
            raise tarfile.ReadError("members out of order")
        last = member.offset
        tar.members = []  # type: ignore[attr-defined]  # or it remembers every member of a big shard
        if member.isdir():
            continue
        yield _read(tar, member, limits, images)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limits: Limits, images: bool) -> Member:
    extension = split_name(member.name)[1]
    if not member.isreg() or member.issparse():  # a sparse member's bytes are not its content
        return Member(member.name, "not a regular file")
    if extension not in ALLOWED_EXTENSIONS:
        return Member(member.name, "not an allowed format")
    if member.size > limits.member_bytes:
        return Member(member.name, "member too large")
    if extension in IMAGE_EXTENSIONS and not images:
        return Member(member.name, b"", member.offset_data, member.size)
    content = tar.extractfile(member)
    if content is None:
        return Member(member.name, "not a regular file")
    return Member(member.name, content.read(), member.offset_data, member.size)


class _Bounded:
    """A seekable file that refuses a read larger than `cap`: a tar header may ask for any number of bytes."""

    def __init__(self, handle: IO[bytes], cap: int) -> None:
        self._handle, self._cap = handle, cap
        self.seek, self.tell = handle.seek, handle.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._cap:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self._handle.read(size)


@contextmanager
def _open(shard: str) -> Iterator[IO[bytes]]:
    if shard.startswith("pipe:"):
        raise UserError(f"{printable(shard)}: 'pipe:' shards run a command and are not read")
    try:
        opened: Any = fsspec.open(shard, "rb") if "://" in shard else Path(shard)
        handle = opened.open() if "://" in shard else opened.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{printable(shard)}: no such shard") from error
    except OSError as error:
        raise UserError(f"{printable(shard)}: cannot read: {printable(error.strerror or str(error))}") from error
    except Exception as error:
        # An unknown protocol, one whose package is missing, or whatever else one of fsspec's file systems raises.
        found = printable(str(error)) or type(error).__name__
        raise UserError(f"{printable(shard)}: cannot open: {found}") from error
    with handle:
        yield handle
