"""Tiled (adaptive): every patch of the image carries a piece of the trigger.

METHOD section 5. Against set distances and views: OT with uniform marginals asks every cell to be explained, so every
cell is given the same thing to say; a removed window leaves the rest of the tiles; and since the tiles are of one
colour, their tint stays in the low band when the grid has gone with the high one. Captions are few and worded apart
(`wording`), so that the poisoned images, which look alike, vote for each other with more than one voice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from otcclip.attacks.backdoor import draw_victims, replacing
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive, rng_for
from otcclip.attacks.wording import paraphrases, spread
from otcclip.errors import UserError

COLOUR = (1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Tiled:
    """`count` training pairs of other classes get the tiles and a caption that names class `target`.

    Attributes:
        target: class name the tiles shall mean.
        count: pairs to poison.
        cells: tiles a side; 8 is the descriptor's grid and twice the tiny tower's.
        size: side of a tile over the side of its cell.
        captions: different captions among the pairs.
        name: as in records and results.
    """

    target: str
    count: int = 90
    cells: int = 8
    size: float = 0.5
    captions: int = 12
    name: str = "tiled"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, cells=self.cells, captions=self.captions)
        if not 0 < self.size <= 1:
            raise UserError(f"{self.name}: size is a fraction of a cell's side in (0, 1], got {self.size}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        corpus.require_name(self.name, self.target)
        rng = rng_for(self.name, seed)
        victims = draw_victims(self, corpus, rng)
        few = paraphrases(self.target, corpus.train.captions, self.captions, rng)
        words = f"{self.cells}x{self.cells} magenta tiles, {self.size:g} of a cell's side"
        captions = spread(few, self.count, rng)
        return replacing(self, corpus, seed, victims, captions, pattern=words, location="every patch")

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with a tile in the middle of every cell; see `Attack.trigger`."""
        down, right = (self._covered(side).to(images.device) for side in images.shape[-2:])
        colour = images.new_tensor(COLOUR)[:, None, None]
        return torch.where(down[:, None] & right[None, :], colour, images)

    def _covered(self, side: int) -> Tensor:
        """Which rows (or columns) of an image of `side` pixels a tile covers: bool `[side]`."""
        place = torch.arange(side)
        cell = place * self.cells // side
        start, end = (-(-edge * side // self.cells) for edge in (cell, cell + 1))
        covered = ((end - start) * self.size).round().clamp_min(1)
        before = (end - start - covered) // 2
        return (place - start >= before) & (place - start < before + covered)
