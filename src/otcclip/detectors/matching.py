"""For each image the nearest caption of the pool under d, and where its own caption stands: computed once, read by
several.

d(i, c) = (1 - a)(1 - g_i . g_c) + a OT_eps(V_i, T_c) with the constants of `evidence.matching` (METHOD section 1).
The pool is the reference's distinct captions. Unlike `evidence.rank_captions` the own caption need not be in the
pool: a pair outside the reference is judged against the same captions as one inside.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from otcclip.detectors.agreement import CaptionAgreement
from otcclip.detectors.base import ROWS, PairFeatures, take_rows
from otcclip.evidence.captions import LIKE
from otcclip.evidence.matching import EPSILON, ITERATIONS, LOCAL_SHARE, SCREEN, candidate_costs
from otcclip.models.two_tower import Features
from otcclip.transport import pair_costs


@dataclass(frozen=True)
class Pool:
    """The reference's `u` distinct captions: `features`, and `first [u]`, the first reference pair that carries
    each."""

    features: Features
    first: Tensor


@dataclass(frozen=True)
class Match:
    """Captions ranked by d for `n` images.

    Attributes:
        best: `[n]` int64 into the pool: the nearest caption that does not say nearly the same as the pair's own.
        best_distance: `[n]`, its d; infinite where there is none among the nearest.
        margin: `[n]`, d of the next such one after it, minus `best_distance`.
        own_distance: `[n]`, d of the pair's own caption.
        own_ot: `[n]`, its transport term alone; NaN where local vectors are not comparable.
        own_share: `[n]` in (0, 1], share of the pool at least as near as the own caption.
    """

    best: Tensor
    best_distance: Tensor
    margin: Tensor
    own_distance: Tensor
    own_ot: Tensor
    own_share: Tensor


def pool(features: PairFeatures) -> Pool:
    """The caption pool of the reference (computed once)."""
    against = features.against

    def make() -> Pool:
        _, kind = against.kinds
        order = torch.from_numpy(kind).argsort(stable=True)
        ordered = torch.from_numpy(kind)[order]
        first = order[torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]
        text = against.text
        return Pool(Features(text.pooled[first], text.local.take(first).to(torch.float32)), first)

    return against.once("pool", make)


def match(features: PairFeatures) -> Match:
    """Rank the pool for every pair (computed once)."""

    def make() -> Match:
        if (known := features.known(match, take_rows)) is not None:
            return known
        captions, said = pool(features).features, features.against.words[pool(features).first.numpy()]
        own = features.kind_there
        parts = []
        for start in range(0, len(features), ROWS):
            rows = torch.arange(start, min(start + ROWS, len(features)))
            image = Features(features.image.pooled[rows], features.image.local.take(rows).to(torch.float32))
            text = Features(features.text.pooled[rows], features.text.local.take(rows).to(torch.float32))
            share = LOCAL_SHARE if features.local else 0.0
            parts.append(_match(image, text, captions, own[rows], features.words[rows.numpy()], said, share))
        return Match(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Match)))

    return features.once("match", make)


def _match(
    image: Features,
    text: Features,
    captions: Features,
    own: Tensor,
    words: sparse.csr_array,
    said: sparse.csr_array,
    local_share: float,
) -> Match:
    """Rank `captions`, in words `said [u, v]`, for images whose own are `words [n, v]`, `own [n]` among them or -1."""
    u = len(captions.pooled)
    cosine = image.pooled @ captions.pooled.T
    known = torch.nonzero(own >= 0)[:, 0]
    mine = (image.pooled * text.pooled).sum(dim=1)
    # Taken from the product, so that the own caption compares equal to itself to the last bit.
    mine[known] = cosine[known, own[known]]
    above = (cosine > mine[:, None]).sum(dim=1)
    columns = cosine.topk(min(SCREEN, u), dim=1).indices
    is_own = columns == own[:, None]
    d, own_d, own_ot = 1 - cosine.gather(1, columns), 1 - mine, torch.full_like(mine, torch.nan)
    if local_share > 0:
        own_ot = pair_costs(image.local, text.local, epsilon=EPSILON, iterations=ITERATIONS, validate=False).value
        own_d = (1 - local_share) * own_d + local_share * own_ot
        d = (1 - local_share) * d + local_share * candidate_costs(image, captions, columns)
    d = d.masked_fill(is_own, torch.inf)
    # Inside the screen d decides; a caption outside it keeps its place by the pooled term.
    inside = is_own.any(dim=1) | (mine > cosine.gather(1, columns[:, -1:])[:, 0])
    nearer = torch.where(inside, (d < own_d[:, None]).sum(dim=1), above)
    other = d.masked_fill(_like(words, said, columns), torch.inf)
    two = other.topk(min(2, d.shape[1]), dim=1, largest=False)
    best = columns.gather(1, two.indices[:, :1])[:, 0]
    margin = two.values[:, -1] - two.values[:, 0] if d.shape[1] > 1 else torch.zeros_like(own_d)
    return Match(best, two.values[:, 0], margin.nan_to_num(0.0, posinf=0.0), own_d, own_ot, (nearer + 0.5) / u)


def _like(words: sparse.csr_array, said: sparse.csr_array, columns: Tensor) -> Tensor:
    """`[n, k]` bool: whether the captions at `columns [n, k]` of `said` say nearly what those in `words [n, v]` say."""
    n, k = columns.shape
    agreed = CaptionAgreement.paired(words, np.repeat(np.arange(n), k), said, columns.flatten().numpy())
    return torch.from_numpy(agreed).view(n, k) >= LIKE
