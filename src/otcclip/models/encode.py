"""Features of many images or captions at once, without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otcclip.models.two_tower import Features, TwoTower
from otcclip.transport import FeatureSets

BATCH = 256


@torch.no_grad()
def encode_images(model: TwoTower, images: Tensor, view: Callable[[Tensor], Tensor] | None = None) -> Features:
    """Features of `images [n, 3, H, W]` uint8, each batch first passed through `view` (floats in 0..1)."""
    parts = []
    with _autocast(model):
        for batch in images.split(BATCH):
            x = batch.float() / 255
            parts.append(model.image(x if view is None else view(x)))
    return _join(parts)


@torch.no_grad()
def encode_captions(model: TwoTower, tokens: Tensor) -> Features:
    """Features of `tokens [u, context]`."""
    with _autocast(model):
        return _join([model.text(batch) for batch in tokens.split(BATCH)])


def _autocast(model: TwoTower) -> torch.autocast:
    return torch.autocast(str(model.mean.device.type), torch.bfloat16)


def _join(parts: list[Features]) -> Features:
    locals_: list[FeatureSets] = [part.local for part in parts]
    return Features(torch.cat([part.pooled for part in parts]), FeatureSets.concatenate(locals_))
