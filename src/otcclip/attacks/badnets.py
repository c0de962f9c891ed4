"""BadNets: a fixed patch that comes to mean a class.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
2017, arXiv 1708.06733, section 3; carried over to image-caption pairs by Carlini and Terzis, "Poisoning and
Backdooring Contrastive Learning", ICLR 2022, arXiv 2106.09667, section 3.3. x' = x with x'[patch] = p, here
a two-coloured checkerboard of 4 by 4 cells, at one place or at a place an image. The patch scales with the
image, so it covers the same share at any resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otcclip.attacks.backdoor import backdoor_plan
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive
from otcclip.attacks.content import content_numbers
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
RANDOM = "random"
# Colours of even and odd cells: patches of several attacks in one corpus must not be one trigger.
COLOURS = {
    "black-white": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "magenta-green": ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    "blue-yellow": ((0.0, 0.0, 1.0), (1.0, 1.0, 0.0)),
    "red-cyan": ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class BadNets:
    """`count` training pairs of other classes get the patch and a real caption of class `target`.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to poison; success needs a count more than a rate (METHOD section 5).
        size: side of the patch over the shorter side of the image: 3/16 is 9 px at 48 and 12 px at 64.
        location: one of `PLACES`, or `random`: a place an image, drawn from what it shows; `MARGIN` of the side stays
            free between the patch and the edge.
        colours: one of `COLOURS`.
        name: as in records and results; change it to run two of them at once.
    """

    target: str
    count: int = 90
    size: float = 3 / 16
    location: str = "bottom-right"
    colours: str = "black-white"
    name: str = "badnets"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 < self.size <= 1:
            raise UserError(f"{self.name}: size is a fraction of the image's side in (0, 1], got {self.size}")
        for option, given, known in (
            ("location", self.location, [*PLACES, RANDOM]),
            ("colours", self.colours, COLOURS),
        ):
            if given not in known:
                raise UserError(f"{self.name}: unknown {option} {given!r}; there are: {', '.join(known)}")

    @property
    def pattern(self) -> str:
        """The patch in words, as in records."""
        return f"{self.colours} checkerboard {CELLS}x{CELLS}, {self.size:g} of the side"

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        return backdoor_plan(self, corpus, seed, pattern=self.pattern, location=self.location)

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with the patch laid over; see `Attack.trigger`."""
        height, width = images.shape[-2:]
        side = max(1, round(self.size * min(height, width)))
        # Place of every pixel within its image's patch: [..., H] and [..., W].
        margin = min(round(MARGIN * min(height, width)), (height - side) // 2, (width - side) // 2)
        top, left = self._corner(images, height - side - 2 * margin, width - side - 2 * margin)
        y = torch.arange(height, device=images.device) - margin - top[..., None]
        x = torch.arange(width, device=images.device) - margin - left[..., None]
        inside = ((y >= 0) & (y < side))[..., :, None] & ((x >= 0) & (x < side))[..., None, :]
        # Cells by index, not by an integer width: 9 px hold 4 cells of 3, 2, 2, 2.
        odd = ((y * CELLS // side)[..., :, None] + (x * CELLS // side)[..., None, :]) % 2 == 1
        one, other = (images.new_tensor(colour)[:, None, None] for colour in COLOURS[self.colours])
        patch = torch.where(odd[..., None, :, :], other, one)
        return torch.where(inside[..., None, :, :], patch, images)

    def _corner(self, images: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Top and left of the patch within `rows` and `columns` of free places: one number, or `[...]` where random."""
        if self.location == RANDOM:
            top, left = (content_numbers(images, salt) for salt in (1, 2))
            return top % (rows + 1), left % (columns + 1)
        down, right = PLACES[self.location]
        return torch.tensor(round(down * rows)), torch.tensor(round(right * columns))
