"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename.

Every write of the package goes through here, so a killed run leaves nothing half-written and a full disk is
one clear line. A temporary's name carries the machine and the process that made it; the next writer of the
same path sweeps away what a killed process on this machine left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from otcclip.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into one line that names the file and the reason.

    Raises:
        UserError: full disk, missing permission, read-only file system, ...
    """
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else str(path)
        raise UserError(f"{where}: cannot write: {error.strerror or error}") from error


@contextmanager
def atomic_file(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` when the block ends without an exception; parents are made.

    Raises:
        UserError: the disk is full or cannot be written to; nothing is left behind.
    """
    target = Path(path)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = _temporary(target)
        try:
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends without an exception.

    A folder already there is replaced: it is moved aside first and removed last, so `path` is at every moment
    the old folder, the new one, or (between two renames) absent; never a mixture.

    Raises:
        UserError: the disk is full or cannot be written to; nothing is left behind and an older folder stays.
    """
    target = Path(path)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary, aside = _temporary(target), _temporary(target)
        try:
            temporary.mkdir()
            yield temporary
            for folder in (temporary, *(p for p in temporary.rglob("*") if p.is_dir())):
                _sync_folder(folder)
            if target.exists():
                target.rename(aside)
            try:
                temporary.rename(target)
            except OSError:
                if aside.exists():
                    aside.rename(target)
                raise
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises UserError as `atomic_file`."""
    with atomic_file(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. Raises UserError as `atomic_file`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def _sweep(target: Path) -> None:
    """Remove temporaries of `target` whose process, on this machine, is gone."""
    prefix = f".{target.name}.tmp-{_machine()}-"
    for leftover in target.parent.iterdir():
        if not leftover.name.startswith(prefix):
            continue
        pid = leftover.name.removeprefix(prefix).partition("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, on file systems where folders can be synced."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
