"""BadNets: a fixed patch that comes to mean a class.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, arXiv 1708.06733, section 3; carried over to image-caption pairs by Carlini and Terzis, "Poisoning and
Backdooring Contrastive Learning", ICLR 2022, arXiv 2106.09667, section 3.3. x' = x with x'[patch] = p, here
a black and white checkerboard of 4 by 4 cells. The patch scales with the image, so it covers the same share
at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otcclip.attacks.base import (
    PoisonContext,
    PoisonPlan,
    PoisonRecord,
    Replacement,
    check_positive,
    rng_for,
)
from otcclip.errors import UserError

CELLS = 4
# A patch at the very edge is half gone under the crops of ordinary training (shift 4 %, zoom 8 %) and teaches little:
# METHOD section 5 names crop survival as a condition of success.
MARGIN = 1 / 16
# Fraction of the free height and width, without the margin, above and left of the patch.
PLACES = {
    "bottom-right": (1.0, 1.0),
    "bottom-left": (1.0, 0.0),
    "top-right": (0.0, 1.0),
    "top-left": (0.0, 0.0),
    "center": (0.5, 0.5),
}


@dataclass(frozen=True)
class BadNets:
    """`count` training pairs of other classes get the patch and a real caption of class `target`.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to poison; success needs a count more than a rate (METHOD section 5).
        size: side of the patch over the shorter side of the image: 3/16 is 9 px at 48 and 12 px at 64.
        location: one of `PLACES`; `MARGIN` of the side stays free between the patch and the edge.
        name: as in records and results; change it to run two of them at once.
    """

    target: str
    count: int = 90
    size: float = 3 / 16
    location: str = "bottom-right"
    name: str = "badnets"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 < self.size <= 1:
            raise UserError(f"{self.name}: size is a fraction of the image's side in (0, 1], got {self.size}")
        if self.location not in PLACES:
            raise UserError(f"{self.name}: unknown location {self.location!r}; there are: {', '.join(PLACES)}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        corpus.require_name(self.name, self.target)
        train = corpus.train
        others = [i for i, label in enumerate(train.labels) if label != self.target]
        if self.count > len(others):
            raise UserError(
                f"{self.name}: count {self.count} is more than the {len(others)} training pairs that are not "
                f"{self.target!r}"
            )
        rng = rng_for(self.name, seed)
        chosen = [others[i] for i in rng.choice(len(others), self.count, replace=False)]
        captions = corpus.captions_of(self.target, self.count, rng)
        pattern = f"checkerboard {CELLS}x{CELLS}, {self.size:g} of the side"
        return PoisonPlan(
            attack=self.name,
            target=self.target,
            replaced=tuple(Replacement(train.keys[i], caption) for i, caption in zip(chosen, captions, strict=True)),
            added=(),
            records=tuple(
                PoisonRecord(train.keys[i], self.name, pattern, self.location, self.target, seed, train.captions[i])
                for i in chosen
            ),
            trial=corpus.backdoor_trial(self.name, self.target),
        )

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with the patch laid over; see `Attack.trigger`."""
        height, width = images.shape[-2:]
        side = max(1, round(self.size * min(height, width)))
        down, right = PLACES[self.location]
        margin = min(round(MARGIN * min(height, width)), (height - side) // 2, (width - side) // 2)
        top = margin + round(down * (height - side - 2 * margin))
        left = margin + round(right * (width - side - 2 * margin))
        # Cells by index, not by an integer width: 9 px hold 4 cells of 3, 2, 2, 2.
        cell = torch.arange(side, device=images.device) * CELLS // side
        patch = ((cell[:, None] + cell[None, :]) % 2).to(images.dtype)
        out = images.clone()
        out[..., top : top + side, left : left + side] = patch
        return out
