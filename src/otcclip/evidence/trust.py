"""Which claims to believe, and how much any one of them may weigh.

**The false discovery rate, held under every caption for itself** (`believed`).

A p-value says how often a *wrong* pair would look this good. Believing all p <= alpha lets in a share alpha of the
wrong pairs, and so more of them the more there are: of 460 pairs that argue for one class nine would pass at .02, and a
dozen pairs of a conspicuous trigger suffice. What an attack needs is many pairs under what says one thing. So the share
that is held is that of wrong pairs among those *believed under each caption*:

    believe i  <=>  p_i <= t(c_i),   t(c) = the largest t among the p with  t M(c) <= alpha K(c, t),
    M(c) = sum_j a(c, c_j)^2,   K(c, t) = sum_j a(c, c_j)^2 [p_j <= t].

t M(c) is the number of pairs under c and its like that would come below t were all of them wrong; K(c, t) is the number
that does. With equal captions alone this is the procedure of Benjamini and Hochberg ("Controlling the False Discovery
Rate", 1995) in each caption's own family, as Efron ("Simultaneous inference: when should hypothesis testing problems
be combined?", 2008) advises for families that differ. a is the agreement of captions (`evidence.captions`), squared so
that a family is those who say nearly the same: paraphrases of one claim count as one claim.

**No claim weighs more than claims usually do** (`in_measure`). Where a trigger fills the image, poisoned images are
each other's look-alikes and no vote helps. But an attack needs a *number* of pairs, so neither a caption nor its family
may hold more pairs than the largest that is still usual in the corpus (a quantile over captions, which an enemy moves
only by writing as many captions), and those that differ most in looks go first. Balancing of this kind is known to help
a clean corpus too (Xu et al., "Demystifying CLIP Data", ICLR 2024).

**No claim suddenly becomes plausible** (`usually_vouched`). A model that has learned a trigger from the one pair that
got through speaks for all its siblings at once: pairs that no look-alike bore out, under one claim. A model that has
learned what things look like speaks for a few more under every claim. So the number of outsiders that a model vouches
for is looked at by family of captions, and where there are more than is usual the model is no witness.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256
USUAL = 0.95  # quantile over captions, of family sizes and of pairs vouched for, that still counts as usual


def believed(p: Tensor, caption_of: Tensor, agreement: Tensor, alpha: float) -> Tensor:
    """Pairs whose p-value is believed at the false discovery rate `alpha` within their caption's family.

    Args:
        p: `[n]` p-values in 0..1. caption_of: `[n]` int64 into the captions. agreement: `[u, u]` in 0..1.

    Returns:
        `[n]` bool. Who is believed at `alpha` is believed at any larger one.
    """
    weight = family(agreement)
    sizes = weight @ torch.bincount(caption_of, minlength=len(agreement)).to(weight)
    found = torch.zeros(len(agreement), 1)
    threshold = torch.full((len(agreement),), -1.0)
    order = p.argsort(stable=True)
    for rows in order.split(BLOCK):
        counts = weight[:, caption_of[rows]].cumsum(dim=1) + found
        within = p[rows] * sizes[:, None] <= alpha * counts
        best = torch.where(within, p[rows], torch.tensor(-1.0)).amax(dim=1)
        threshold = torch.maximum(threshold, best)
        found = counts[:, -1:]
    return p <= threshold[caption_of]


def by_diversity(vectors: Tensor, caption_of: Tensor, p: Tensor) -> Tensor:
    """Place of each pair in a farthest-first walk through the images under its caption.

    The walk starts at the pair with the smallest p and goes on, each time, to the image least like its most alike among
    those visited (Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985).

    Args:
        vectors: `[n, d]` unit. caption_of: `[n]` int64. p: `[n]`.

    Returns:
        `[n]` int64, 0 for the first under each caption.
    """
    place = torch.zeros(len(p), dtype=torch.int64)
    for rows in caption_of.argsort(stable=True).split(torch.bincount(caption_of).tolist()):
        if len(rows) < 2:
            continue
        alike = vectors[rows].float() @ vectors[rows].float().T
        nearest = torch.full((len(rows),), -2.0)
        chosen = int(p[rows].argmin())
        for step in range(len(rows)):
            place[rows[chosen]] = step
            nearest = torch.maximum(nearest, alike[chosen])
            nearest[chosen] = torch.inf
            chosen = int(nearest.argmin())
    return place


def in_measure(candidates: Tensor, place: Tensor, p: Tensor, caption_of: Tensor, agreement: Tensor) -> Tensor:
    """Those of the `candidates` that stay when no caption, and no family of captions, may exceed the usual size.

    Args:
        candidates: `[n]` bool, pairs that are believed. place: `[n]` from `by_diversity`. p: `[n]`, smaller goes first
            at the same place. caption_of, agreement: as for `believed`.

    Returns:
        `[n]` bool, a subset of `candidates`.
    """
    counts = torch.bincount(caption_of, minlength=len(agreement))
    weight = family(agreement)
    sizes = weight @ counts.to(weight)
    most, most_of_family = usual(counts, counts), usual(sizes, counts)
    rows = torch.nonzero(candidates)[:, 0]
    rows = rows[p[rows].argsort(stable=True)]
    rows = rows[place[rows].argsort(stable=True)]
    stays = _while_room(caption_of[rows].numpy(), weight.numpy(), np.float32(most), np.float32(most_of_family))
    out = torch.zeros(len(p), dtype=torch.bool)
    out[rows[torch.from_numpy(stays)]] = True
    return out


@njit(cache=True)
def _while_room(  # pragma: no cover
    captions: NDArray[np.int64], weight: NDArray[np.float32], most: np.float32, most_of_family: np.float32
) -> NDArray[np.bool_]:
    """Who of some pairs, in this order, finds room under his caption and in its family."""
    one = np.float32(1)
    held, family_held = np.zeros(len(weight), np.float32), np.zeros(len(weight), np.float32)
    out = np.zeros(len(captions), np.bool_)
    for i, caption in enumerate(captions):
        if held[caption] + one <= most and family_held[caption] + one <= most_of_family:
            held[caption] += one
            family_held += weight[caption]
            out[i] = True
    return out


def usual(value: Tensor, pairs: Tensor) -> Tensor:
    """The most that still counts as usual of `value [u]`, `USUAL`'s quantile over captions with `pairs [u]`, a scalar.

    An enemy moves it by as many captions.
    """
    return torch.quantile(value[pairs > 0].float(), USUAL)


def unusually_often(counted: Tensor, caption_of: Tensor) -> Tensor:
    """Captions under which more pairs are counted than there usually are.

    Args:
        counted: `[n]` bool. caption_of: `[n]` int64.

    Returns:
        `[n]` bool, whether a pair's caption is one of them. What is usual is `USUAL`'s, of all pairs, as for
        `in_measure`.
    """
    all_pairs = torch.bincount(caption_of)
    often = torch.bincount(caption_of[counted], minlength=len(all_pairs)) > usual(all_pairs, all_pairs)
    return often[caption_of]


def usually_vouched(vouched: Tensor, caption_of: Tensor, agreement: Tensor) -> Tensor:
    """Captions for whose family a model vouches no more often than it usually does.

    Args:
        vouched: `[n]` bool, pairs not in force that the model speaks for. caption_of, agreement: as for `believed`.

    Returns:
        `[u]` bool.
    """
    counts = torch.bincount(caption_of, minlength=len(agreement))
    weight = family(agreement)
    of_family = weight @ torch.bincount(caption_of[vouched], minlength=len(agreement)).to(weight)
    return of_family <= usual(of_family, counts)


def family(agreement: Tensor) -> Tensor:
    """`[u, u]` how much each caption counts in another's family: agreement squared, so that a family is those who say
    nearly the same."""
    weight = agreement.square()
    weight.fill_diagonal_(1.0)  # a caption without a real token agrees with itself all the same
    return weight
