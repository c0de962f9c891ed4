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
        if features.against is features:
            return _centred(features)[0]
        means = _centred(features.against)[1]
        return torch.stack([_unit(x, m) for x, m in zip(_uncentred(features), means, strict=True)])

    return features.once("encoder's views", make)


def _centred(reference: PairFeatures) -> tuple[Tensor, list[Tensor]]:
    """A reference's views, and the means that were taken out."""

    def make() -> tuple[Tensor, list[Tensor]]:
        seen = _uncentred(reference)
        means = [x.mean(dim=0) for x in seen]
        return torch.stack([_unit(x, m) for x, m in zip(seen, means, strict=True)]), means

    return reference.once("encoder's views, centred", make)


def _unit(x: Tensor, mean: Tensor) -> Tensor:
    return F.normalize(x - mean, dim=1).bfloat16()


def _uncentred(features: PairFeatures) -> list[Tensor]:
    side = grid_side(features.image.local)
    if side < 3 or side != grid_side(features.against.image.local):
        return [features.image.pooled]
    parts: list[Tensor] = []
    weights = windows(side)
    for start in range(0, len(features), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(features)))
        cells = features.image.local.take(rows).values.view(len(rows), side * side, -1).float()
        parts.append(F.normalize(weights @ cells, dim=2))
    return list(torch.cat(parts).unbind(1))


def grid_side(local: FeatureSets) -> int:
    """Side of the square grid that every set is, else 0."""
    sizes = local.sizes
    if not len(sizes) or bool((sizes != sizes[0]).any()):
        return 0
    side = math.isqrt(int(sizes[0]))
    return side if side * side == int(sizes[0]) else 0


def windows(side: int) -> Tensor:
    """`[v, side * side]` weights over the cells, each view's summing to one: all cells, then without a window of half
    the side at nine places."""
    half = side // 2
    places = sorted({0, (side - half) // 2, side - half})
    out = [torch.ones(side, side)]
    for top in places:
        for left in places:
            mask = torch.ones(side, side)
            mask[top : top + half, left : left + half] = 0
            out.append(mask)
    return torch.stack([(mask / mask.sum()).flatten() for mask in out])


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
