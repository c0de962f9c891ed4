"""Features of many images or captions at once, without gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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


def low_band(x: Tensor) -> Tensor:
    """Only what survives at an eighth of the side."""
    side = x.shape[-1]
    return F.interpolate(F.adaptive_avg_pool2d(x, side // 8), size=(side, side), mode="bilinear")


def without_window(row: int, column: int) -> Callable[[Tensor], Tensor]:
    """Half the side, from `row`, `column` (in quarters of the side), painted over with the image's mean colour."""

    def view(x: Tensor) -> Tensor:
        quarter = x.shape[-1] // 4
        y, z = row * quarter, column * quarter
        out = x.clone()
        out[..., y : y + 2 * quarter, z : z + 2 * quarter] = x.mean(dim=(-1, -2), keepdim=True)
        return out

    return view


JUDGING_VIEWS: tuple[Callable[[Tensor], Tensor] | None, ...] = (
    None,
    low_band,
    *(without_window(r, c) for r in (0, 2) for c in (0, 2)),
    without_window(1, 1),
)
