"""What an image's look-alikes say of its caption, against a fixed reference: `evidence.neighbours` for one shard at a
time.

The rules are that module's: near-duplicates do not vote, voters under one caption share one vote, the worst view
counts, a claim made m times is held to 1 / m. What differs: the image vectors are an encoder's, so a view is the mean
of its cells outside one of nine windows (free, where the encoder has run already); the voters are the reference; and
any caption may be asked about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.detectors.base import ROWS, PairFeatures
from otcclip.evidence.neighbours import NEAR_DUPLICATE, NEIGHBOURS, SHARPNESS
from otcclip.transport import FeatureSets

MOST_ASKED = 2048  # captions that the own one is compared with: a share is then known to .05 %


@dataclass(frozen=True)
class LookAlikes:
    """The vote on `n` pairs.

    Attributes:
        own: `[n]` in (0, 1], share of the captions asked about that the voters like at least as well as the own one, in
            the worst view.
        copies: `[n]` int64, pairs that make the same claim (near-duplicate image, same caption), itself included.
        best: `[n]` int64 into the reference's distinct captions: what the voters like best, other than the own caption.
        best_share: `[n]`, share of captions that the voters like at least as well as that one, in its worst view.
        margin: `[n]`, liking of the best caption minus that of the next but the own, 0..1 of the voters' weight.
    """

    own: Tensor
    copies: Tensor
    best: Tensor
    best_share: Tensor
    margin: Tensor


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
    table: Tensor  # [u, m] agreement of the u distinct captions with the m asked about
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
        table = torch.from_numpy(against.agreement.table(marginals, marginals[asked.numpy()]))
        voice = 1.0 / torch.bincount(kinds, minlength=u).float()
        return _Ballots(view_vectors(against), kinds, voice[kinds], table, asked)

    return against.once("ballots", make)


def _ask(features: PairFeatures) -> LookAlikes:
    against = features.against
    ballots = _ballots(against)
    place = {caption: i for i, caption in enumerate(against.kinds[0])}
    own = torch.tensor([place.get(caption, -1) for caption in features.captions], dtype=torch.int64)
    own_marginals = against.agreement.marginals(features.captions)
    all_marginals = against.agreement.marginals(against.kinds[0])
    mine = view_vectors(features)
    parts = []
    for start in range(0, len(features), ROWS):
        rows = slice(start, start + ROWS)
        marginals = own_marginals[rows]

        def like(voters: Tensor, weight: Tensor, marginals: object = marginals) -> Tensor:
            """How much the voters like each pair's own caption."""
            n, k = voters.shape
            a = marginals[torch.arange(n).repeat_interleave(k).numpy()]  # type: ignore[index]
            b = all_marginals[voters.flatten().numpy()]
            return (torch.from_numpy(against.agreement.paired(a, b)).view(n, k) * weight).sum(dim=1)

        parts.append(_vote(mine[:, rows], features.self_index[rows], own[rows], like, ballots))
    return LookAlikes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LookAlikes)))


def _vote(mine: Tensor, place: Tensor, own: Tensor, like: object, ballots: _Ballots) -> LookAlikes:
    twins: Tensor | None = None
    shares, likings = [], []
    for view, vectors in zip(mine, ballots.views, strict=True):
        cosine = (view @ vectors.T).float()
        if twins is None:
            twins = cosine > NEAR_DUPLICATE
            inside = torch.nonzero(place >= 0)[:, 0]
            twins[inside, place[inside]] = True
        similarity, voters = cosine.masked_fill(twins, -2.0).topk(min(NEIGHBOURS, cosine.shape[1]), dim=1)
        weight = torch.softmax(similarity / SHARPNESS, dim=1) * ballots.voice[voters]
        weight = weight.masked_fill(similarity <= -2.0, 0.0)
        kinds = ballots.kind[voters]
        liked = F.embedding_bag(kinds, ballots.table, per_sample_weights=weight, mode="sum")
        likings.append((liked, weight.sum(dim=1)))
        own_liking = like(kinds, weight)  # type: ignore[operator]
        shares.append(_share(liked, own_liking))
    assert twins is not None
    copies = (twins & (ballots.kind == own[:, None])).sum(dim=1) + (place < 0).long()
    liked, total = likings[0]
    liked = liked.masked_fill(ballots.asked == own[:, None], -1.0)
    two = liked.topk(min(2, liked.shape[1]), dim=1)
    best = two.indices[:, 0]
    best_shares = [_share(x, x.gather(1, best[:, None])[:, 0]) for x, _ in likings]
    margin = ((two.values[:, 0] - two.values[:, -1]) / total.clamp_min(1e-12)).clamp(min=0.0)
    return LookAlikes(
        torch.stack(shares).amax(dim=0),
        copies.clamp_min(1),
        ballots.asked[best],
        torch.stack(best_shares).amax(dim=0),
        margin,
    )


def _share(liked: Tensor, mine: Tensor) -> Tensor:
    """Share of captions liked at least as well; ties count half. Sums in another order may differ in the last bits."""
    slack = 1e-6 + 1e-5 * mine.abs()
    better = (liked > (mine + slack)[:, None]).sum(dim=1)
    equal = ((liked - mine[:, None]).abs() <= slack[:, None]).sum(dim=1)
    return (better + (equal + 1) / 2).clamp(max=liked.shape[1]) / liked.shape[1]
