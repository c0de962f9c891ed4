"""One `otcclip bench` at a time in a folder: two would train the same cells, each over what the other writes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from otcclip.data.atomic import disk_errors
from otcclip.errors import UserError

LOCK = ".lock"


@contextmanager
def sole_bench(out: Path) -> Iterator[None]:
    """Hold `out` while the block runs; the folder is made where there is none.

    The lock is the kernel's and ends with the process, however that ends. Its file stays: removed, it could be locked
    twice, by one process that opened it before and one that made it anew. Workers are spawned and don't inherit it.

    Raises:
        UserError: another process holds the folder, or it cannot be written to.
    """
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = (out / LOCK).open("ab")
    with handle:
        with disk_errors(out / LOCK):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another otcclip bench is at work in {out}; wait for it, or name another --out"
                ) from None
        yield
