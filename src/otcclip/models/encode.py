"""Features of many images or captions at once, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from otcclip.data.images import ImageSource, fetch
from otcclip.models.two_tower import Features, TwoTower
from otcclip.transport import FeatureSets

BATCH = 256


@torch.no_grad()
def encode_images(model: TwoTower, images: Tensor | ImageSource, rows: Tensor | None = None) -> Features:
    """Features, on the CPU, of `images [n, 3, H, W]` uint8, or of those at `rows [m]` alone."""
    chosen = torch.arange(len(images)) if rows is None else rows
    parts = []
    with _autocast(model):
        for batch in fetch(images, chosen.split(BATCH)):
            x = batch.to(model.mean.device).float().div_(255)
            parts.append(model.image(x))
    return _join(parts)


@torch.no_grad()
def encode_captions(model: TwoTower, tokens: Tensor) -> Features:
    """Features, on the CPU, of `tokens [u, context]`."""
    with _autocast(model):
        return _join([model.text(batch.to(model.mean.device)) for batch in tokens.split(BATCH)])


def _autocast(model: TwoTower) -> torch.autocast:
    return torch.autocast(str(model.mean.device.type), torch.bfloat16)


def _join(parts: list[Features]) -> Features:
    locals_: list[FeatureSets] = [part.local.to("cpu") for part in parts]
    return Features(torch.cat([part.pooled.cpu() for part in parts]), FeatureSets.concatenate(locals_))
