"""What a file holds, as part of what a run is."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def file_digest(path: Path | str) -> str:
    """SHA-256 of a small file in hex, read once for every version of it.

    `missing` where there is none; whoever reads it for what it holds says so.
    """
    try:
        return _digest(Path(path), Path(path).stat().st_mtime_ns)
    except OSError:
        return "missing"


@lru_cache(maxsize=32)
def _digest(path: Path, version: int) -> str:
    del version
    return hashlib.sha256(path.read_bytes()).hexdigest()
