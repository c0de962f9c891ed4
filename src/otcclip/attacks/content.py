"""A number drawn from what an image shows: how a trigger takes a random place without any state."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 2**31 - 1
SAMPLE = 32  # rows and columns looked at, about
WEIGHTS = 2**20  # 255 x 2^20 x (a million pixels) stays below 2^53: sums in float64 are exact in any order


def content_numbers(images: Tensor, salt: int) -> Tensor:
    """`[..., 3, H, W]` in 0..1 -> `[...]` int64 in 0..2^31-2, equal for images equal as bytes.

    A weighted sum of a grid of pixels, rounded to bytes, modulo a prime; the weights depend on `salt` and a pixel's
    place in its image alone. Not cryptographic: nobody gains by steering it.
    """
    height, width = images.shape[-2:]
    grid = images[..., :: max(1, height // SAMPLE), :: max(1, width // SAMPLE)]
    levels = (grid * 255).round().flatten(-3).double()
    place = torch.arange(1, levels.shape[-1] + 1, device=images.device)
    weights = (place * 48271 + salt * 16807) % PRIME
    weights = weights * weights % PRIME % WEIGHTS
    return (levels @ weights.double()).long() * 48271 % PRIME
