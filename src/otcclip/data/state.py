"""What is known of each pair (trust, a decision), kept by key in a memory-mapped file.

    trust = StateTable.create(path, keys, suspicion="f4", action="i1")
    trust.put(keys_of_a_shard, suspicion=p)            # any keys, in any order
    StateTable.open(path).get(other_keys)["action"]    # another run, another order, another subset

One record a pair: the key's 64-bit number and the columns, nothing else. Suspicion, action and a caption's number take
8 + 4 + 1 + 4 = 17 bytes a pair: 1.7 GB for 1e8 pairs, of which only the pages touched are in memory. Looking keys
up costs 16 more bytes a pair while the table is open (a sorted copy and its order).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from otcclip.data.atomic import atomic_file
from otcclip.data.keys import KeyIndex, hash_keys
from otcclip.errors import UserError

MAGIC = b"otcclip-state-1\n"
CHUNK = 1 << 20


class StateTable:
    """Records of `n` pairs: `records [n]`, structured, has `key` and the columns, in the order of creation."""

    def __init__(self, path: Path, records: NDArray[np.void]) -> None:
        self.path, self.records = path, records
        self._index = KeyIndex(np.ascontiguousarray(records["key"]))

    @classmethod
    def create(cls, path: Path | str, keys: Sequence[str], **columns: str) -> StateTable:
        """A new table, zero everywhere.

        Args:
            columns: name to numpy dtype, little-endian ("f4", "i1", "i4").

        Raises:
            UserError: two pairs of one key, or a full disk; no half-written table stays.
        """
        target = Path(path)
        dtype = np.dtype([("key", "<u8"), *((name, kind) for name, kind in columns.items())])
        hashes = hash_keys(keys)
        KeyIndex(hashes)
        header = MAGIC + json.dumps([[name, dtype[name].str] for name in dtype.names or ()]).encode() + b"\n"
        with atomic_file(target) as handle:
            # Written, not mapped: a map of a full disk kills the process.
            handle.write(header)
            for start in range(0, len(hashes), CHUNK):
                part = np.zeros(len(hashes[start : start + CHUNK]), dtype)
                part["key"] = hashes[start : start + CHUNK]
                handle.write(part.tobytes())
        return cls.open(target)

    @classmethod
    def open(cls, path: Path | str) -> StateTable:
        """Map a table that `create` made; writes go to the file.

        Raises:
            UserError: missing, or not such a table.
        """
        target = Path(path)
        try:
            with target.open("rb") as handle:
                if handle.read(len(MAGIC)) != MAGIC:
                    raise ValueError("not a table of state")
                dtype = np.dtype([(str(name), str(kind)) for name, kind in json.loads(handle.readline(4096))])
                start = handle.tell()
            if dtype.hasobject or (target.stat().st_size - start) % dtype.itemsize:
                raise ValueError("truncated")
            records = np.memmap(target, dtype, mode="r+", offset=start) if target.stat().st_size > start else None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{target}: cannot be read as state of pairs: {error}") from error
        return cls(target, np.zeros(0, dtype) if records is None else records)

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """`[m]` where each key's record is, -1 where it has none."""
        return self._index.find(hash_keys(keys))

    def get(self, keys: Sequence[str]) -> NDArray[np.void]:
        """The records of `keys`, in their order.

        Raises:
            KeyError: a key without a record.
        """
        return np.asarray(self.records[self._found(keys)])

    def put(self, keys: Sequence[str], **values: ArrayLike) -> None:
        """Set columns of these keys' records. Raises KeyError for a key without a record."""
        rows = self._found(keys)
        for name, value in values.items():
            self.records[name][rows] = value

    def flush(self) -> None:
        """Make what was put survive a power cut."""
        if isinstance(self.records, np.memmap):
            self.records.flush()

    def _found(self, keys: Sequence[str]) -> NDArray[np.int64]:
        rows = self.rows(keys)
        if len(missing := np.flatnonzero(rows < 0)):
            raise KeyError(keys[int(missing[0])])
        return rows
