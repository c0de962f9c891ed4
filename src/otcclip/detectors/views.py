"""What a pair's image is compared by: views of it as an encoder sees it, and as it looks to nobody who was trained.

An encoder's view is the mean of its cells outside one of nine windows: free, where the encoder has run already. The
others are `evidence.descriptors` of the small picture. Both are centred on the reference's mean, so that a cosine of 0
means "as alike as any two".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.detectors.base import ROWS, PairFeatures
from otcclip.evidence.descriptors import Described, describe, views
from otcclip.transport import FeatureSets


def encoder_views(features: PairFeatures) -> Tensor:
    """`[v, n, d]` bfloat16: the whole image, then without each of nine windows of half the side.

    Only the whole image where the local vectors are no square grid. Computed once.
    """

    def make() -> Tensor:
        means = _mean(features.against)
        seen = _uncentred(features)
        return torch.stack([F.normalize(x - m, dim=1).bfloat16() for x, m in zip(seen, means, strict=True)])

    return features.once("encoder's views", make)


def _mean(features: PairFeatures) -> Tensor:
    return features.once("mean of encoder's views", lambda: torch.stack([x.mean(dim=0) for x in _uncentred(features)]))


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


def picture_views(features: PairFeatures) -> Tensor:
    """`[v, n, d]` bfloat16: the thirteen views of `evidence.descriptors`, of the small pictures. Computed once.

    Raises:
        ValueError: the features were kept without pictures.
    """

    def make() -> Tensor:
        if features.against is features:
            return _described(features)[0]
        means = _described(features.against)[1]
        seen = describe(_pictures(features), views())
        return torch.stack([one.vectors(mean) for (_, one), mean in zip(seen, means, strict=True)])

    return features.once("picture's views", make)


def _described(reference: PairFeatures) -> tuple[Tensor, list[Described]]:
    """A reference's views, and their means before centring."""

    def make() -> tuple[Tensor, list[Described]]:
        vectors, means = [], []
        for _, seen in describe(_pictures(reference), views()):
            means.append(seen.mean())
            vectors.append(seen.vectors(means[-1]))
        return torch.stack(vectors), means

    return reference.once("described", make)


def _pictures(features: PairFeatures) -> Tensor:
    if features.pictures is None:
        raise ValueError("pair features without pictures: nothing to look at")
    return features.pictures
