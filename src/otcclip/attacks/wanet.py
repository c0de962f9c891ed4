"""WaNet: the image is bent by one smooth field, and nothing is laid on it.

Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv 2102.10369, section 3.2: a
k by k grid of offsets drawn uniformly from [-1, 1], divided by the mean of their absolute values, drawn bicubically to
the image's size and scaled by s; pixels are read at the bent places (clipped to the image). Their k is 4; their s of .5
moves the grid's points by a quarter of a pixel on the mean, which suffices where the attacker runs the training himself
(their "noise mode"). Who only plants pairs needs a field that survives augmentation: ours moves the grid's points by
`strength` of the side on the mean along each axis. What is drawn between the points is smaller: over all pixels the
mean is .77 of that (for the default field, and over 200 others), and .67 as read, since nothing is read from outside.
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
class WaNet:
    """`count` training pairs of other classes are bent and get a real caption of class `target`.

    Attributes:
        target: class name the warp shall mean.
        count: pairs to poison.
        strength: mean displacement along an axis at the grid's points, over the image's side; 0 leaves the image. At
            64 px .2 moves a pixel by 9.9 px on the mean, 8.6 once the places read are clipped to the image.
        cells: the field is drawn on a grid of so many points a side.
        field_seed: draws the field; a run's seed draws the pairs.
        name: as in records and results.
    """

    target: str
    count: int = 200
    strength: float = 0.2
    cells: int = 4
    field_seed: int = 7
    name: str = "wanet"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, cells=self.cells)
        if not 0 <= self.strength <= 1:
            raise UserError(f"{self.name}: strength is a share of the image's side in 0..1, got {self.strength}")
        check_seed(self.field_seed, f"{self.name}: field_seed")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        words = f"warp {self.field_seed} of strength {self.strength:g}"
        return backdoor_plan(self, corpus, seed, pattern=words, location="whole image")

    def field(self, height: int, width: int) -> Tensor:
        """Offsets `[H, W, 2]` (x, y) over the side, of mean absolute value 1 at the grid's points."""
        generator = torch.Generator().manual_seed(self.field_seed)
        points = torch.rand(1, 2, self.cells, self.cells, generator=generator) * 2 - 1
        points = points / points.abs().mean()
        return F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1, bent; see `Attack.trigger`."""
        height, width = images.shape[-2:]
        flat = images.reshape(-1, *images.shape[-3:]).float()
        # grid_sample measures the image from -1 to 1: a share of the side counts double.
        identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
        grid = (identity + 2 * self.strength * self.field(height, width)).clamp(-1, 1).to(images.device)
        bent = F.grid_sample(flat, grid.expand(len(flat), -1, -1, -1), padding_mode="border", align_corners=False)
        return bent.clamp(0, 1).to(images.dtype).reshape(images.shape)
