"""SIG: a sinusoid across the whole image.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019,
arXiv 1902.11237, equation 1: v(i, j) = D sin(2 pi j f / W), x' = x + v clipped to the range of a pixel. They poison
images of the target class only; here, as in the literature on CLIP, images of other classes get a caption of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otcclip.attacks.backdoor import backdoor_plan
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive
from otcclip.errors import UserError


@dataclass(frozen=True)
class Sig:
    """`count` training pairs of other classes get the stripes and a real caption of class `target`.

    Attributes:
        target: class name the stripes shall mean.
        count: pairs to poison.
        strength: the sinusoid's height, in units of the full range of a pixel.
        periods: periods across the width.
        name: as in records and results.
    """

    target: str
    count: int = 135
    strength: float = 60 / 255
    periods: float = 6
    name: str = "sig"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 <= self.strength <= 1:
            raise UserError(f"{self.name}: strength is a share of a pixel's range in 0..1, got {self.strength}")
        if self.periods <= 0:
            raise UserError(f"{self.name}: periods across the image must be above 0, got {self.periods}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        words = f"{self.periods:g} sine stripes of {self.strength * 255:.0f}/255"
        return backdoor_plan(self, corpus, seed, pattern=words, location="whole image")

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with the sinusoid added and clipped; see `Attack.trigger`."""
        width = images.shape[-1]
        column = torch.arange(width, device=images.device, dtype=torch.float32)
        wave = self.strength * torch.sin(2 * math.pi * self.periods * column / width)
        return (images + wave.to(images.dtype)).clamp(0, 1)
