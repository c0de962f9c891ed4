"""Views under which a model judges an image: a true caption survives each, a trigger does not (METHOD section 2.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


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
