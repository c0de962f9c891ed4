"""What an image's look-alikes say of its caption, against a fixed reference: `evidence.neighbours`, a shard at a time.

The rules are that module's: near-duplicates do not vote, voters under one caption share one vote, the vote is taken
under several views, a claim made m times is held to 1 / m. What differs: the image vectors are an encoder's, so a
view is the mean of its cells outside one of nine windows (free, where the encoder has run already); the voters are
the reference; and any caption may be asked about.

How the constants were chosen, without any poison label: on the emoji corpus a tenth of the captions were shuffled by
ourselves, and the choice is what tells those from the rest best (AUROC .944 for 64 voters at sharpness .1 and the
mean of logs over the views; .921 for the 16 and .05 that the untrained descriptor uses, .932 for the worst view).
docs/scan.md has the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from otcclip.detectors.agreement import CaptionAgreement
from otcclip.detectors.base import ROWS, PairFeatures, take_rows
from otcclip.detectors.matching import match
from otcclip.evidence.captions import agreement_table
from otcclip.evidence.neighbours import NEAR_DUPLICATE
from otcclip.transport import FeatureSets

NEIGHBOURS = 64
SHARPNESS = 0.1  # cosine difference at which a voter's weight falls by e
MOST_ASKED = 2048  # captions that the own one is compared with: a share is then known to .05 %


@dataclass(frozen=True)
class LookAlikes:
    """The vote on `n` pairs.

    Attributes:
        own: `[n]` in (0, 1], share of the captions asked about that the voters like at least as well as the own one,
            joined over the views.
        copies: `[n]` int64, pairs that make the same claim (near-duplicate image, same caption), itself included.
        nominee: `[n]` int64 into the reference's distinct captions: another caption that may fit. The encoder's nearest
            where it can tell (`matching`), else what the voters like best.
        nominee_share: `[n]`, as `own`, of the nominee.
        nominee_place: `[n]`, its place among the captions asked about: 1 is liked best in every view, ties count half.
    """

    own: Tensor
    copies: Tensor
    nominee: Tensor
    nominee_share: Tensor
    nominee_place: Tensor


def look_alikes(features: PairFeatures) -> LookAlikes:
    """Ask the reference (computed once)."""
    return features.once("look-alikes", lambda: _ask(features))


def view_vectors(features: PairFeatures) -> Tensor:
    """`[v, n, d]` bfloat16: the whole image, then without each of nine windows of half the side.

    Centred on the reference's mean, so that a cosine of 0 means "as alike as any two"; only the whole image where the
    local vectors are no square grid. Computed once.
    """

    def make() -> Tensor:
        means = _mean(features.against)
        views = _uncentred(features)
        return torch.stack([F.normalize(x - m, dim=1).bfloat16() for x, m in zip(views, means, strict=True)])

    return features.once("views", make)


def _mean(features: PairFeatures) -> Tensor:
    return features.once("view means", lambda: torch.stack([x.mean(dim=0) for x in _uncentred(features)]))


def _uncentred(features: PairFeatures) -> list[Tensor]:
    side = grid_side(features.image.local)
    if side < 3 or side != grid_side(features.against.image.local):
        return [features.image.pooled]
    parts: list[list[Tensor]] = []
    weights = windows(side)
    for start in range(0, len(features), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(features)))
        cells = features.image.local.take(rows).values.view(len(rows), side * side, -1).float()
        parts.append([F.normalize(torch.einsum("npd,p->nd", cells, weight), dim=1) for weight in weights])
    return [torch.cat(view) for view in zip(*parts, strict=True)]


def grid_side(local: FeatureSets) -> int:
    """Side of the square grid that every set is, else 0."""
    sizes = local.sizes
    if not len(sizes) or bool((sizes != sizes[0]).any()):
        return 0
    side = math.isqrt(int(sizes[0]))
    return side if side * side == int(sizes[0]) else 0


def windows(side: int) -> list[Tensor]:
    """Weights over the cells, each summing to one: all cells, then without a window of half the side at nine places."""
    half = side // 2
    places = sorted({0, (side - half) // 2, side - half})
    out = [torch.ones(side, side)]
    for top in places:
        for left in places:
            mask = torch.ones(side, side)
            mask[top : top + half, left : left + half] = 0
            out.append(mask)
    return [(mask / mask.sum()).flatten() for mask in out]


@dataclass(frozen=True)
class _Ballots:
    """The reference as voters: what each caption kind is agreed with, and how loud each voter is."""

    views: Tensor
    kind: Tensor
    voice: Tensor
    words: sparse.csr_array  # [u, v] of the distinct captions
    table: Tensor  # [u, m] agreement of the distinct captions with those asked about
    asked: Tensor  # [m] int64 into the distinct captions


def _ballots(against: PairFeatures) -> _Ballots:
    def make() -> _Ballots:
        distinct, kind = against.kinds
        kinds = torch.from_numpy(kind)
        u = len(distinct)
        asked = torch.arange(u)
        if u > MOST_ASKED:
            asked = torch.randperm(u, generator=torch.Generator().manual_seed(0))[:MOST_ASKED].sort().values
        marginals = against.agreement.marginals(distinct)
        table = torch.from_numpy(agreement_table(marginals, marginals[asked.numpy()]))
        voice = 1.0 / torch.bincount(kinds, minlength=u).float()
        return _Ballots(view_vectors(against), kinds, voice[kinds], marginals, table, asked)

    return against.once("ballots", make)


def _ask(features: PairFeatures) -> LookAlikes:
    if (known := features.known(look_alikes, take_rows)) is not None:
        return known
    against = features.against
    ballots = _ballots(against)
    place = {caption: i for i, caption in enumerate(against.kinds[0])}
    own = torch.tensor([place.get(caption, -1) for caption in features.captions], dtype=torch.int64)
    words = against.agreement.marginals(features.captions)
    mine = view_vectors(features)
    best = match(features).best if features.joint else None
    parts = []
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        votes, twins = _votes(mine[:, rows], features.self_index[rows], ballots)
        copies = (twins & (ballots.kind == own[rows, None])).sum(dim=1) + (features.self_index[rows] < 0).long()
        nominee = _favourite(votes[0], own[rows], ballots) if best is None else best[rows]
        named = ballots.words[nominee.numpy()]
        seconded = joined([_share(vote, named, ballots) for vote in votes])
        parts.append(
            LookAlikes(
                joined([_share(vote, words[rows], ballots) for vote in votes]),
                copies.clamp_min(1),
                nominee,
                seconded,
                seconded * len(ballots.asked),
            )
        )
    return LookAlikes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LookAlikes)))


def joined(shares: list[Tensor]) -> Tensor:
    """Geometric mean over the views: what bears a caption out in one view of ten counts a tenth."""
    return torch.stack(shares).log().mean(dim=0).exp()


@dataclass(frozen=True)
class _Vote:
    """One view: captions and weight of the voters, `[n, k]`, and how well each caption asked about is liked."""

    kinds: Tensor
    weight: Tensor
    liked: Tensor  # [n, m]


def _votes(mine: Tensor, place: Tensor, ballots: _Ballots) -> tuple[list[_Vote], Tensor]:
    """The vote in each view, and `[n, m]` which of the reference are near-duplicates (by the whole image) or self."""
    twins = (mine[0] @ ballots.views[0].T) > NEAR_DUPLICATE
    inside = torch.nonzero(place >= 0)[:, 0]
    twins[inside, place[inside]] = True
    out = []
    for view, vectors in zip(mine, ballots.views, strict=True):
        cosine = (view @ vectors.T).float().masked_fill_(twins, -2.0)
        similarity, voters = cosine.topk(min(NEIGHBOURS, cosine.shape[1]), dim=1)
        weight = torch.softmax(similarity / SHARPNESS, dim=1) * ballots.voice[voters]
        weight = weight.masked_fill(similarity <= -2.0, 0.0)
        kinds = ballots.kind[voters]
        out.append(_Vote(kinds, weight, F.embedding_bag(kinds, ballots.table, per_sample_weights=weight, mode="sum")))
    return out, twins


def _share(vote: _Vote, words: sparse.csr_array, ballots: _Ballots) -> Tensor:
    """Share of the captions asked about that are liked at least as well as those in `words [n, v]`; ties count half."""
    n, k = vote.kinds.shape
    theirs = ballots.words[vote.kinds.flatten().numpy()]
    agreed = CaptionAgreement.paired(words[np.repeat(np.arange(n), k)], theirs)
    mine = (torch.from_numpy(agreed).view(n, k) * vote.weight).sum(dim=1)
    # Sums in another order differ in their last bits; a caption among those asked about must tie with itself.
    slack = 1e-7 + 1e-5 * mine
    better = (vote.liked > (mine + slack)[:, None]).sum(dim=1)
    equal = ((vote.liked - mine[:, None]).abs() <= slack[:, None]).sum(dim=1)
    return ((better + (equal + 1) / 2) / vote.liked.shape[1]).clamp(max=1.0)


def _favourite(vote: _Vote, own: Tensor, ballots: _Ballots) -> Tensor:
    """What the voters like best among the captions asked about, other than the own one."""
    return ballots.asked[vote.liked.masked_fill(ballots.asked == own[:, None], -1.0).argmax(dim=1)]
