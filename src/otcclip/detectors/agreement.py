"""How alike captions are, by optimal transport between their words and nothing learned.

As `evidence.captions`, whose table of agreements serves here too: under the discrete metric OT(a, b) = 1 - sum_w
min(a_w, b_w), and marginals are inverse document frequencies. Here for any caption against any other, with frequencies
counted over one fixed set of captions: a shard's captions are compared with the reference's without a matrix of all
with all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

_WORD = re.compile(r"\w+")
MAX_WORDS = 128  # an enemy's caption may have 4,096 characters; nobody describes an image in so many words


def words(caption: str) -> list[str]:
    """The distinct lower-case words of a caption, at most 128, in order."""
    return list(dict.fromkeys(_WORD.findall(caption.lower())))[:MAX_WORDS]


class CaptionAgreement:
    """Agreement `1 - OT` of captions, 0 to 1; word weights log(m / document frequency) over the `m` captions given."""

    def __init__(self, captions: Sequence[str]) -> None:
        counts: dict[str, int] = {}
        for caption in captions:
            for word in words(caption):
                counts[word] = counts.get(word, 0) + 1
        self._size = max(2, len(captions))
        self._column = {word: i for i, word in enumerate(sorted(counts))}
        self._idf = {word: float(np.log(self._size / n)) for word, n in counts.items()}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The words of the fixed set, in the order of the marginals' columns."""
        return tuple(self._column)

    def marginals(self, captions: Sequence[str]) -> sparse.csr_array:
        """`[u, v]` rows that sum to one, or below where words never seen in the fixed set take their share."""
        rows, columns, values = [], [], []
        for i, caption in enumerate(captions):
            weight = {word: self._idf.get(word, float(np.log(self._size))) for word in words(caption)}
            total = sum(weight.values())
            for word, value in weight.items():
                if value > 0 and word in self._column:
                    rows.append(i)
                    columns.append(self._column[word])
                    values.append(value / total)
        shape = (len(captions), max(1, len(self._column)))
        return sparse.csr_array((np.array(values, np.float32), (rows, columns)), shape=shape)

    @staticmethod
    def paired(
        a: sparse.csr_array, of_a: NDArray[np.int64], b: sparse.csr_array, of_b: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Agreement of row `of_a[i]` of `a` with row `of_b[i]` of `b`, both from `marginals`: `[l]`."""
        return _paired(False, a.indptr, a.indices, a.data, of_a, b.indptr, b.indices, b.data, of_b)

    @staticmethod
    def loudest(
        a: sparse.csr_array, of_a: NDArray[np.int64], b: sparse.csr_array, of_b: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The largest share of both captions that one word has in them, of the same rows: `[l]`."""
        return _paired(True, a.indptr, a.indices, a.data, of_a, b.indptr, b.indices, b.data, of_b)


@njit(cache=True)
def _paired(  # pragma: no cover
    loudest: bool,
    starts_a: NDArray[np.int32],
    words_a: NDArray[np.int32],
    mass_a: NDArray[np.float32],
    of_a: NDArray[np.int64],
    starts_b: NDArray[np.int32],
    words_b: NDArray[np.int32],
    mass_b: NDArray[np.float32],
    of_b: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Both rows are read once, word by word in order; as sparse matrices the rows would be copied first."""
    out = np.zeros(len(of_a), np.float32)
    for pair in range(len(of_a)):
        i, end_a = starts_a[of_a[pair]], starts_a[of_a[pair] + 1]
        j, end_b = starts_b[of_b[pair]], starts_b[of_b[pair] + 1]
        while i < end_a and j < end_b:
            if words_a[i] < words_b[j]:
                i += 1
            elif words_a[i] > words_b[j]:
                j += 1
            else:
                both = min(mass_a[i], mass_b[j])
                out[pair] = max(out[pair], both) if loudest else out[pair] + both
                i += 1
                j += 1
    return out
