"""How alike two captions are, by optimal transport between their tokens and nothing learned.

Before training there is no trusted text encoder. What can be had is the discrete metric: two tokens are equal or not.
Under that metric optimal transport has a closed form, OT(a, b) = 1 - sum_w min(a_w, b_w) (the total variation), so
agreement `1 - OT` is a histogram intersection. Marginals are not uniform: a token weighs its inverse document
frequency, or every caption would agree with every other by its commas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from otcclip.errors import UserError

MAX_CAPTIONS = 20_000
LIKE = 0.25  # agreement from which two captions make like claims


def token_marginals(tokens: Tensor) -> NDArray[np.float32]:
    """`tokens [u, context]` -> `[u, v]` rows that sum to one over the `v` token kinds in use (all zero where empty)."""
    ids: NDArray[np.int64] = tokens.numpy()
    end = ids.argmax(axis=1)
    position = np.arange(ids.shape[1])
    real = (position > 0) & (position < end[:, None])
    rows, columns = np.nonzero(real)
    kinds, kind = np.unique(ids[rows, columns], return_inverse=True)
    present = np.zeros((len(ids), len(kinds)), np.float32)
    present[rows, kind] = 1.0
    idf = np.log(len(ids) / present.sum(axis=0))
    weights = (present * idf).astype(np.float32)
    total = weights.sum(axis=1, keepdims=True)
    out: NDArray[np.float32] = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return out


def caption_agreement(tokens: Tensor) -> NDArray[np.float32]:
    """Agreement `1 - OT` of every caption with every other, `[u, u]` in 0..1, of `tokens [u, context]`.

    Raises:
        UserError: more than 20,000 distinct captions; the tiled form for larger pools is not built yet.
    """
    if len(tokens) > MAX_CAPTIONS:
        raise UserError(
            f"captions: agreement of {len(tokens):,} distinct captions needs the tiled form, which is not built yet "
            f"(at most {MAX_CAPTIONS:,})"
        )
    marginals = sparse.csr_array(token_marginals(tokens))
    return agreement_table(marginals, marginals)


def agreement_table(a: sparse.csr_array, b: sparse.csr_array) -> NDArray[np.float32]:
    """Agreement `1 - OT` of every row of `a [u, v]` with every row of `b [m, v]`, marginals over the same words."""
    out = np.zeros((a.shape[0], b.shape[0]), np.float32)
    by_word_a, by_word_b = a.tocsc(), b.tocsc()
    # A word at a time: only captions that share it gain.
    for word in np.flatnonzero((np.diff(by_word_a.indptr) > 0) & (np.diff(by_word_b.indptr) > 0)):
        i = slice(by_word_a.indptr[word], by_word_a.indptr[word + 1])
        j = slice(by_word_b.indptr[word], by_word_b.indptr[word + 1])
        smaller = np.minimum.outer(by_word_a.data[i], by_word_b.data[j])
        out[np.ix_(by_word_a.indices[i], by_word_b.indices[j])] += smaller
    return out
