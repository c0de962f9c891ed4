"""Counting a vote of the reference on captions of other pairs: the rule of `evidence.neighbours` for any caption.

Voters under one caption share one vote, and so do the members of a crowd; who makes the same claim has none
(`detectors.claims`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from otcclip.detectors.agreement import CaptionAgreement
from otcclip.detectors.base import ROWS, PairFeatures
from otcclip.detectors.claims import claims
from otcclip.evidence.captions import agreement_table

MOST_ASKED = 2048  # captions that the own one is compared with: a share is then known to .05 %


@dataclass(frozen=True)
class Electorate:
    """The reference as voters: which of its distinct captions each carries, and how loud each is.

    Attributes:
        kind: `[m]` int64. voice: `[m]`.
        words: `[u, v]` of the distinct captions.
        asked: `[a]` int64 into the distinct captions; table: `[u, a]`, how far each agrees with those.
    """

    kind: Tensor
    voice: Tensor
    words: sparse.csr_array
    asked: Tensor
    table: Tensor


def electorate(against: PairFeatures) -> Electorate:
    """The voters of a reference (computed once)."""

    def make() -> Electorate:
        distinct, kind = against.kinds
        kinds, found = torch.from_numpy(kind), claims(against)
        u = len(distinct)
        asked = torch.arange(u)
        if u > MOST_ASKED:
            asked = torch.randperm(u, generator=torch.Generator().manual_seed(0))[:MOST_ASKED].sort().values
        marginals = against.agreement.marginals(distinct)
        table = torch.from_numpy(agreement_table(marginals, marginals[asked.numpy()]))
        voice = 1.0 / (torch.bincount(kinds, minlength=u)[kinds] * torch.where(found.crowded, found.made, 1)).float()
        return Electorate(kinds, voice, marginals, asked, table)

    return against.once("electorate", make)


@dataclass(frozen=True)
class Vote:
    """Of `r` pairs in one view: their voters `[r, k]`, nearest first, what each vote weighs, and how well each caption
    asked about is liked `[r, a]`."""

    voters: Tensor
    weight: Tensor
    liked: Tensor


def poll(
    features: PairFeatures,
    mine: Tensor,
    theirs: Tensor,
    silent: sparse.csr_array,
    neighbours: int,
    sharpness: float,
) -> Iterator[tuple[slice, list[Vote]]]:
    """Let each pair's look-alikes vote, a block of pairs at a time, once in each view.

    Args:
        mine: `[v, n, d]`, theirs: `[v, m, d]` unit vectors. silent: `[n, m]` bool, who has no vote on whom.
        neighbours: voters a pair. sharpness: cosine difference at which a voter's weight falls by e.
    """
    voting = electorate(features.against)
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        apart = silent[rows].tocoo()
        row, image = torch.from_numpy(apart.row).long(), torch.from_numpy(apart.col).long()
        votes = []
        for view, vectors in zip(mine[:, rows], theirs, strict=True):
            cosine = view @ vectors.T
            cosine[row, image] = -2.0
            similarity, voters = cosine.topk(min(neighbours, cosine.shape[1]), dim=1)
            similarity = similarity.float()
            weight = torch.softmax(similarity / sharpness, dim=1) * voting.voice[voters]
            weight = weight.masked_fill(similarity <= -2.0, 0.0)
            liked = F.embedding_bag(voting.kind[voters], voting.table, per_sample_weights=weight, mode="sum")
            votes.append(Vote(voters, weight, liked))
        yield rows, votes


def share(vote: Vote, words: sparse.csr_array, voting: Electorate) -> Tensor:
    """`[r]` share of the captions asked about that are liked at least as well as those in `words [r, v]`; ties count
    half."""
    r, k = vote.voters.shape
    theirs = voting.kind[vote.voters].flatten().numpy()
    agreed = CaptionAgreement.paired(words, np.repeat(np.arange(r), k), voting.words, theirs)
    mine = (torch.from_numpy(agreed).view(r, k) * vote.weight).sum(dim=1)
    return share_above(vote.liked, mine)


def share_above(liked: Tensor, mine: Tensor) -> Tensor:
    """`[r]` in (0, 1], share of `liked [r, a]`, none below 0, at least as large as `mine [r]`; ties count half."""
    above = torch.from_numpy(_above(liked.numpy(), mine.numpy()))
    return ((above + 0.5) / liked.shape[1]).clamp(max=1.0)


@njit(cache=True)
def _above(liked: NDArray[np.float32], mine: NDArray[np.float32]) -> NDArray[np.float32]:  # pragma: no cover
    """`[r]` how many of `liked [r, a]` are above `mine [r]`, ties for half. Sums in another order differ in their last
    bits; a caption among those asked about must tie with itself."""
    out = np.empty(len(liked), np.float32)
    for i in range(len(liked)):
        slack = np.float32(1e-7) + np.float32(1e-5) * mine[i]
        low, high = mine[i] - slack, mine[i] + slack
        halves = np.int32(0)
        for value in liked[i]:
            halves += np.int32(value >= low) + np.int32(value > high)
        out[i] = halves / np.float32(2.0)
    return out
