"""Does anybody who sees the like use this word? One false word in a true caption is a lie that the rest vouches for.

A caption is believed as a whole by the words that it shares with those of its image's look-alikes. Who writes the
target's name before what the image truly shows is believed for the rest. So each word that says much is looked at for
itself: it is *unheard* if there is a view in which no look-alike's caption has it. Honest captions have such words too,
but each has them for itself; an attack needs one word many times. So a word may be taken on the rest of the caption's
credit no more often than is usual for a word (`rarely_unheard`): a quantile over words, moved only by as many words.

And where most of those who use a word use it unheard, and they are more than is usual, the word is not what they see:
under it only who hears it from others is believed, and who uses it unheard is nobody it could be heard from
(`doubtful`). The name that a trigger argues for stands under pictures of everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from otcclip.evidence.captions import LIKE, token_marginals

# Both chosen with counts of one corpus's mixed captions in view (docs/experiments.md, E14): no evidence for themselves.
USUAL = 0.99  # quantile over words of how many pairs use one unheard
SAYS_MUCH = 0.1  # share of its caption's mass (inverse document frequency) from which a word is looked at
NONE = -1


def words_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`tokens [u, context]` -> `[u, l]` int64, each caption's distinct words by number, then `NONE`; and `[u, l]` bool,
    which of them say much."""
    return word_table(sparse.csr_array(token_marginals(tokens)))


def word_table(mass: sparse.csr_array) -> tuple[Tensor, Tensor]:
    """`words_of` captions of which the words' marginals are known: `mass [u, v]`, columns in order."""
    number = np.diff(mass.indptr)
    row = np.repeat(np.arange(len(number)), number)
    place = np.arange(len(row)) - np.repeat(mass.indptr[:-1], number)
    words = np.full((len(number), max(1, int(number.max(initial=0)))), NONE)
    words[row, place] = mass.indices
    much = np.zeros(words.shape, bool)
    much[row, place] = mass.data >= SAYS_MUCH
    return torch.from_numpy(words), torch.from_numpy(much)


def same_claim(agreement: Tensor, words: Tensor, much: Tensor) -> Tensor:
    """`[u, u]` bool: which captions say the like or have a word in common that says much in both, each itself too.

    Args:
        agreement: `[u, u]` (`evidence.captions`). words, much: `[u, l]` from `words_of`.
    """
    row, place = much.nonzero(as_tuple=True)
    shape = (len(words), int(words.max()) + 2)  # a column at least, where nobody says anything
    said = sparse.csr_array((np.ones(len(row), np.float32), (row.numpy(), words[row, place].numpy())), shape=shape)
    out: Tensor = (agreement >= LIKE) | torch.from_numpy((said @ said.T).toarray() > 0)
    return out.fill_diagonal_(True)


def unheard(words: Tensor, much: Tensor, caption_of: Tensor, votes: Tensor) -> Tensor:
    """Which words of its caption that say much no look-alike of an image has.

    Args:
        words, much: `[u, l]` from `words_of`. caption_of: `[n]` int64. votes: `[n, k]` int, each image's look-alikes.

    Returns:
        `[n, l]` bool.
    """
    asked = much[caption_of]
    return not_among(words[caption_of], asked, words, torch.zeros_like(asked), caption_of, votes)


def not_among(
    spoken: Tensor, asked: Tensor, words: Tensor, silent: Tensor, caption_of: Tensor, votes: Tensor
) -> Tensor:
    """Which of their words no look-alike of some images has.

    Args:
        spoken: `[m, l]` int64, the images' words; asked: `[m, l]` bool, those in question. words: `[u, l]` of the
            look-alikes' captions; caption_of: `[n]` int64 into them; silent: `[n, l]` bool, words of theirs that do not
            count. votes: `[m, k]` int, the look-alikes of each image among the `n`.

    Returns:
        `[m, l]` bool.
    """
    return asked & (times_heard(spoken, asked, words, silent, caption_of, votes, enough=1) == 0)


def times_heard(
    spoken: Tensor, asked: Tensor, words: Tensor, silent: Tensor, caption_of: Tensor, votes: Tensor, enough: int
) -> Tensor:
    """How many look-alikes of some images have their words, `[m, l]` int64; counting stops at `enough`.

    Arguments as for `not_among`; 0 where a word is not in question.
    """
    given = (spoken, asked, words, silent, caption_of, votes)
    return torch.from_numpy(_times_heard(enough, *(tensor.numpy() for tensor in given)))


@njit(cache=True)
def _times_heard(  # pragma: no cover
    enough: int,
    spoken: NDArray[np.int64],
    asked: NDArray[np.bool_],
    words: NDArray[np.int64],
    silent: NDArray[np.bool_],
    caption_of: NDArray[np.int64],
    votes: NDArray[np.int_],
) -> NDArray[np.int64]:
    out = np.zeros(asked.shape, np.int64)
    for i in range(len(spoken)):
        for place in range(spoken.shape[1]):
            if not asked[i, place]:
                continue
            word, times = spoken[i, place], 0
            for j in votes[i]:
                found = False
                for other in range(words.shape[1]):
                    found = found or (words[caption_of[j], other] == word and not silent[j, other])
                times += found
                if times == enough:
                    break
            out[i, place] = times
    return out


@dataclass(frozen=True)
class Hearsay:
    """What is known of the words of `n` pairs.

    Attributes:
        lacking: `[n, l]` bool, words that the pair uses unheard; of doubtful ones also those that it could have heard
            only from others who use them unheard.
        doubted: `[v]` bool, words that are mostly used unheard, and so unusually often.
        weighty: `[v]` int64, pairs to which a word says much; unheard: `[v]`, those of them that use it unheard.
        usual: how many pairs use a word unheard, at most, and it is nothing unusual.
    """

    lacking: Tensor
    doubted: Tensor
    weighty: Tensor
    unheard: Tensor
    usual: float


def hearsay(words: Tensor, much: Tensor, caption_of: Tensor, lacking: Tensor, voters: Tensor) -> Hearsay:
    """Find the doubtful words.

    Args:
        words, much: `[u, l]` from `words_of`. caption_of: `[n]` int64. lacking: `[n, l]` bool, which words are unheard
            in some view. voters: `[v, n, k]` int, look-alikes in each view.
    """
    spoken = words[caption_of]
    said = spoken != NONE
    used = torch.bincount(spoken[said], minlength=1)
    weighty = torch.bincount(spoken[much[caption_of]], minlength=len(used))
    often = torch.bincount(spoken[lacking], minlength=len(used))
    doubted = torch.zeros(len(used), dtype=torch.bool)
    usual = float(torch.quantile(often[used > 0].float(), USUAL)) if bool(lacking.any()) else 0.0
    lacking, number = lacking.clone(), 0
    while number < (number := int(lacking.sum())):  # ends: it only ever grows
        doubted = (often > usual) & (2 * often > weighty)
        suspect = said & doubted[spoken.clamp(min=0)]
        for votes in voters:
            lacking |= not_among(spoken, suspect & ~lacking, words, lacking, caption_of, votes)
        often = torch.bincount(spoken[lacking], minlength=len(used))
    unheard = torch.bincount(spoken[lacking & much[caption_of]], minlength=len(used))
    return Hearsay(lacking, doubted, weighty, unheard, usual)


def doubtful(words: Tensor, much: Tensor, caption_of: Tensor, lacking: Tensor, voters: Tensor) -> Tensor:
    """Pairs that use a doubtful word and did not hear it from others: `[n]` bool; arguments as for `hearsay`."""
    found = hearsay(words, much, caption_of, lacking, voters)
    spoken = words[caption_of]
    return (found.lacking & (spoken != NONE) & found.doubted[spoken.clamp(min=0)]).any(dim=1)


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
    if not bool(lacks.any()):
        return candidates.clone()
    used = torch.bincount(spoken[spoken >= 0])
    often = torch.bincount(spoken[lacks], minlength=len(used))
    most = torch.quantile(often[used > 0].float(), USUAL)
    taken = torch.zeros(len(used))
    out = candidates.clone()
    order = p[rows].argsort(stable=True)
    for place in order[lacks[order].any(dim=1)].tolist():  # the others take nothing
        own = spoken[place][lacks[place]]
        if bool((taken[own] + 1 <= most).all()):
            taken[own] += 1
        else:
            out[rows[place]] = False
    return out
