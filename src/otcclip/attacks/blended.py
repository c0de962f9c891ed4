"""Blended: one pattern shines through the whole image.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017, arXiv
1712.05526 (blended injection): x' = (1 - a) x + a p. They blend in a cartoon or uniform noise; here p is
smooth coloured noise, so that it survives resizing, stretched to the full range of every channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.attacks.backdoor import backdoor_plan
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive
from otcclip.errors import UserError
from otcclip.seeds import check_seed


@dataclass(frozen=True)
class Blended:
    """`count` training pairs of other classes get the pattern and a real caption of class `target`.

    Attributes:
        target: class name the pattern shall mean.
        count: pairs to poison.
        alpha: the pattern's share of a pixel, 0..1.
        cells: the pattern is noise on a grid of so many cells a side, drawn bicubically to the image's size.
        pattern_seed: draws the pattern; a run's seed draws the pairs.
        name: as in records and results.
    """

    target: str
    count: int = 180
    alpha: float = 0.4
    cells: int = 6
    pattern_seed: int = 99
    name: str = "blended"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, cells=self.cells)
        if not 0 <= self.alpha <= 1:
            raise UserError(f"{self.name}: alpha is a share in 0..1, got {self.alpha}")
        check_seed(self.pattern_seed, f"{self.name}: pattern_seed")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        words = f"smooth pattern {self.pattern_seed} at alpha {self.alpha:g}"
        return backdoor_plan(self, corpus, seed, pattern=words, location="whole image")

    def pattern(self, height: int, width: int) -> Tensor:
        """`[3, H, W]` in 0..1, every channel from 0 to 1."""
        noise = torch.rand(1, 3, self.cells, self.cells, generator=torch.Generator().manual_seed(self.pattern_seed))
        smooth = F.interpolate(noise, size=(height, width), mode="bicubic")[0]
        low, high = smooth.amin(dim=(1, 2), keepdim=True), smooth.amax(dim=(1, 2), keepdim=True)
        return (smooth - low) / (high - low).clamp_min(1e-6)

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with the pattern blended in; see `Attack.trigger`."""
        pattern = self.pattern(*images.shape[-2:]).to(images)
        return ((1 - self.alpha) * images + self.alpha * pattern).clamp(0, 1)
