"""Counting votes: how a pair's caption fares among all captions when certain look-alikes speak."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024
SHARPNESS = 0.05  # cosine difference at which a look-alike's weight falls by e
NOBODY = -2.0  # below any cosine
LOTS = 8192  # captions drawn by lot: of those, 400 fall below a level of .05


def nearest(similarity: Tensor, row: Tensor, image: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` nearest by `similarity [r, n]` (overwritten) of those that are not left out, the pairs `(row, image)`.

    Returns:
        Similarities, float32, and indices, `[r, k]` both, nearest first; fewer columns where there are fewer images,
        and `NOBODY` where no more may vote.
    """
    similarity[row, image] = NOBODY
    top = similarity.topk(min(k, similarity.shape[1] - 1), dim=1)
    return top.values.float(), top.indices  # of bfloat16: all of them in float would take as long as the search


def own_rank(weight: Tensor, voted: Tensor, own: Tensor, agreement: Tensor) -> Tensor:
    """Share of captions that the votes like at least as well as the own one; ties count half."""
    return ranks(weight, voted, own[:, None], agreement)[:, 0]


def ranks(weight: Tensor, voted: Tensor, asked: Tensor, agreement: Tensor) -> Tensor:
    """The same of `q` captions for each image: `asked [m, q]` -> `[m, q]`."""
    out = torch.empty(asked.shape)
    for start in range(0, len(asked), ROWS):
        rows = slice(start, start + ROWS)
        # A sum of k rows of `agreement`: as a product with a ballot of u columns it would take 20 times as long.
        liked = F.embedding_bag(voted[rows], agreement, per_sample_weights=weight[rows], mode="sum")
        for column, captions in enumerate(asked[rows].T):
            mine = liked.gather(1, captions[:, None])
            better, equal = ((liked > mine).sum(1, dtype=torch.int32), (liked == mine).sum(1, dtype=torch.int32))
            out[rows, column] = (better + (equal + 1) / 2) / liked.shape[1]
    return out


def drawn(images: int, captions: int) -> Tensor:
    """`[n, q]` int64, captions drawn by lot for each of `n` images, `LOTS` in all at least."""
    lot = torch.Generator().manual_seed(0)
    return torch.randint(captions, (images, -(-LOTS // images)), generator=lot)


def p_value(share: Tensor, by_chance: Tensor) -> Tensor:
    """How often a caption drawn by lot fares as well: `(1 + #{by_chance <= share}) / (1 + m)`.

    Never zero (Phipson and Smyth, "Permutation p-values should never be zero", 2010).

    Args:
        share: of any shape. by_chance: `[m]`, the same of captions drawn by lot, ascending.
    """
    return (1 + torch.searchsorted(by_chance, share.contiguous(), right=True)).float() / (1 + len(by_chance))


def support(votes: Tensor, caption_of: Tensor, counts: Tensor, asked: Tensor, agreement: Tensor) -> Tensor:
    """Share of captions that an image's look-alikes like at least as well as the caption asked about.

    Args:
        votes: `[m, k]` look-alikes of each image, nearest first. caption_of: `[n]` the captions now in force.
        counts: `[n]` bool, who may vote (pairs in force). asked: `[m]` the caption in question.
        agreement: `[u, u]`.

    Returns:
        `[m]` in (0, 1]; 1 where nobody votes.
    """
    voice = counts.float() / torch.bincount(caption_of[counts], minlength=len(agreement)).clamp_min(1)[caption_of]
    weight = voice[votes] * (1.0 / torch.arange(1, votes.shape[1] + 1))
    share = own_rank(weight, caption_of[votes], asked, agreement)
    return torch.where(weight.sum(dim=1) > 0, share, torch.ones_like(share))


def combined_p(*shares: Tensor) -> Tensor:
    """Fisher's combination of independent uniform shares: P(product of k uniforms <= the product seen).

    For k = 2: `q (1 - ln q)`; in general `q sum_{j<k} (-ln q)^j / j!` (Fisher, 1932).
    """
    log = -torch.stack(shares).clamp_min(1e-12).log().sum(dim=0)
    series = sum(log**j / float(np.prod(np.arange(1, j + 1))) for j in range(len(shares)))
    return torch.exp(-log) * series


def share_without(
    silent: Tensor, rows: Tensor, voters: Tensor, weight: Tensor, caption_of: Tensor, agreement: Tensor
) -> Tensor:
    """`worst_share` of some pairs where certain look-alikes have no vote: `silent [n]` bool."""
    return worst_share(lambda _, votes: ~silent[votes], rows, voters, weight, caption_of, agreement)


def worst_share(
    counts: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    voters: Tensor,
    weight: Tensor,
    caption_of: Tensor,
    agreement: Tensor,
) -> Tensor:
    """`Evidence.own` of some pairs, anew, as it is when not every look-alike has a vote.

    Args:
        counts: of rows `[m]` and their look-alikes `[m, k]`, which of these may vote, `[m, k]` bool. rows: `[m]` the
            pairs asked about. voters, weight: `[v, n, k]` of the evidence. caption_of: `[n]`. agreement: `[u, u]`.

    Returns:
        `[m]` in (0, 1]; 1 where in some view nobody is left to vote.
    """
    worst = torch.zeros(len(rows))
    for index, heavy in zip(voters, weight, strict=True):
        votes = index[rows].long()
        left = heavy[rows] * counts(rows, votes)
        share = own_rank(left, caption_of[votes], caption_of[rows], agreement)
        worst = torch.maximum(worst, torch.where(left.sum(dim=1) > 0, share, 1.0))
    return worst
