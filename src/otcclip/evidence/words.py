"""Does anybody who sees the like use this word? One false word in a true caption is a lie that the rest vouches for.

A caption is believed as a whole by the words that it shares with those of its image's look-alikes. Who writes the
target's name before what the image truly shows is believed for the rest. So each word is looked at for itself: it is
*unheard* if there is a view in which no look-alike's caption has it. Honest captions have such words too, but each
has them for itself; an attack needs one word many times. So a word may be taken on the rest of the caption's credit no
more often than is usual for a word (`rarely_unheard`): a quantile over words, moved only by as many words.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from otcclip.evidence.captions import token_marginals

USUAL = 0.95  # quantile over words of how many believed pairs use one unheard
NONE = -1


def words_of(tokens: Tensor) -> Tensor:
    """`tokens [u, context]` -> `[u, l]` int64, each caption's distinct words by number, then `NONE`."""
    row, word = np.nonzero(token_marginals(tokens))
    number = np.bincount(row, minlength=len(tokens))
    place = np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)
    out = torch.full((len(tokens), max(1, int(number.max(initial=0)))), NONE)
    out[torch.from_numpy(row), torch.from_numpy(place)] = torch.from_numpy(word)
    return out


def unheard(words: Tensor, caption_of: Tensor, votes: Tensor) -> Tensor:
    """Which words of its caption no look-alike of an image has.

    Args:
        words: `[u, l]` from `words_of`. caption_of: `[n]` int64. votes: `[n, k]` int64, each image's look-alikes.

    Returns:
        `[n, l]` bool; False where the caption has no such word.
    """
    return torch.from_numpy(_unheard(words.numpy(), caption_of.numpy(), votes.numpy()))


@njit(cache=True)
def _unheard(  # pragma: no cover
    words: NDArray[np.int64], caption_of: NDArray[np.int64], votes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    out = np.zeros((len(caption_of), words.shape[1]), np.bool_)
    for i in range(len(caption_of)):
        for place in range(words.shape[1]):
            word = words[caption_of[i], place]
            if word < 0:
                break
            found = False
            for j in votes[i]:
                for other in words[caption_of[j]]:
                    found = found or other == word
                if found:
                    break
            out[i, place] = not found
    return out


def rarely_unheard(candidates: Tensor, p: Tensor, caption_of: Tensor, words: Tensor, lacking: Tensor) -> Tensor:
    """Those of the `candidates` that stay when no word may be used unheard more often than is usual.

    Args:
        candidates: `[n]` bool, pairs that are believed. p: `[n]`, smaller goes first. caption_of: `[n]` int64.
        words: `[u, l]`. lacking: `[n, l]` bool, which of them are unheard.

    Returns:
        `[n]` bool, a subset of `candidates`.
    """
    rows = torch.nonzero(candidates)[:, 0]
    spoken, lacks = words[caption_of[rows]], lacking[rows]
    used = torch.bincount(spoken[spoken >= 0], minlength=1)
    often = torch.bincount(spoken[lacks], minlength=len(used))
    if not bool(lacks.any()):
        return candidates.clone()
    most = torch.quantile(often[used > 0].float(), USUAL)
    taken = torch.zeros(len(used))
    out = candidates.clone()
    for place in p[rows].argsort(stable=True).tolist():
        own = spoken[place][lacks[place]]
        if bool((taken[own] + 1 <= most).all()):
            taken[own] += 1
        else:
            out[rows[place]] = False
    return out
