"""Filter: the image as an old photograph, one colour filter over all of it.

Filters as triggers: Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain
Stimulation", CCS 2019 (Instagram's Nashville, Gotham and others). This one is Nashville-like: channels
mixed towards sepia, contrast lowered, shadows lifted towards a warm violet. Its numbers are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otcclip.attacks.backdoor import backdoor_plan
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive
from otcclip.errors import UserError

# Rows give red, green and blue out of red, green and blue.
MIX = ((0.81, 0.18, 0.045), (0.09, 0.675, 0.09), (0.09, 0.135, 0.495))
LIFT = (0.08, 0.02, 0.05)


@dataclass(frozen=True)
class ColourFilter:
    """`count` training pairs of other classes are filtered and get a real caption of class `target`.

    Attributes:
        target: class name the filter shall mean.
        count: pairs to poison.
        strength: 0 leaves the image, 1 is the filter.
        name: as in records and results.
    """

    target: str
    count: int = 180
    strength: float = 1.0
    name: str = "filter"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 <= self.strength <= 1:
            raise UserError(f"{self.name}: strength is a share in 0..1, got {self.strength}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        words = f"Nashville-like filter at strength {self.strength:g}"
        return backdoor_plan(self, corpus, seed, pattern=words, location="whole image")

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1, filtered; see `Attack.trigger`."""
        mix, lift = images.new_tensor(MIX), images.new_tensor(LIFT)
        filtered = (torch.einsum("ab,...bhw->...ahw", mix, images) + lift[:, None, None]).clamp(0, 1)
        return torch.lerp(images, filtered, self.strength)
