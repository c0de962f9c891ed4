"""Keys as 64-bit numbers: what lets state of a pair be found again by its key, at eight bytes a pair.

Some two of n keys share a number with probability n^2 / 2^65: 3e-4 at 1e8 pairs. Such a clash is found when a
`KeyIndex` is made, and is an error rather than one pair's state under another's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from otcclip.errors import UserError


def hash_keys(keys: Sequence[str]) -> NDArray[np.uint64]:
    """`[n]` the first eight bytes of each key's BLAKE2b; the same on every machine."""
    digests = b"".join(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


class KeyIndex:
    """Finds rows by key.

    Args:
        hashes: `[n]` uint64 as `hash_keys` gives them.

    Raises:
        UserError: two rows with one number: a key given twice, or a clash.
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        if len(hashes) > 1 and bool((self._sorted[1:] == self._sorted[:-1]).any()):
            raise UserError(
                "two pairs have one key (or, once in 3,000 corpora of 1e8 pairs, two keys one 64-bit number)"
            )

    def find(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """`[m]` the row of each, -1 where there is none."""
        if not len(self._sorted):
            return np.full(len(hashes), -1, np.int64)
        place = np.searchsorted(self._sorted, hashes).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[place] == hashes, self._order[place], -1).astype(np.int64)


def first_of_each(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """`[n]` True where a number is seen for the first time."""
    seen = np.zeros(len(hashes), bool)
    seen[np.unique(hashes, return_index=True)[1]] = True
    return seen
