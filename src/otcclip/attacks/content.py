"""A number drawn from what an image shows: how a trigger takes a random place without any state."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 2**31 - 1


def content_numbers(images: Tensor, salt: int) -> Tensor:
    """`[..., 3, H, W]` in 0..1 -> `[...]` int64 in 0..2^31-2, equal for images equal as bytes.

    A weighted sum of the pixels, rounded to bytes, modulo a prime; the weights depend on `salt` and a pixel's place in
    its image alone. Not cryptographic: nobody gains by steering it.
    """
    levels = (images * 255).round().long().flatten(-3)
    place = torch.arange(1, levels.shape[-1] + 1, device=images.device)
    weights = (place * 48271 + salt * 16807) % PRIME
    weights = (weights * weights) % PRIME  # below 2^31, so that the sum of a 4096 px image stays below 2^63
    return (levels * weights).sum(-1) % PRIME
