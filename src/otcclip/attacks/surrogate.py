"""A model in the attacker's hands: what a white-box attack knows of the towers and of the distance it is judged by.

    surrogate = load_surrogate("runs/demo/clip")
    poison(train, test, [make("low-ot", target="banana")], seed=0, surrogate=surrogate)
    poison(train, test, [make("low-ot", target="banana", surrogate="runs/demo/clip")], seed=0)      # the same

The second form is for specs, which are text. Where both are given the attack's own option wins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from otcclip.errors import UserError
from otcclip.evidence.matching import LOCAL_SHARE, candidate_costs
from otcclip.models import Features, TwoTower, load_two_tower

BATCH = 256
COSTS = 1 << 15  # transport problems solved at a time


class Surrogate(Protocol):
    """Features as the defended model would compute them."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the images it sees."""
        ...

    def see(self, images: Tensor) -> Features:
        """Features of `images [n, 3, H, W]`, floats in 0..1, with gradient to the pixels."""
        ...

    def read(self, captions: Sequence[str]) -> Features:
        """Features of captions, without gradient."""
        ...


class ModelSurrogate:
    """A finished `TwoTower`, frozen."""

    def __init__(self, model: TwoTower) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        return self.model.image_size

    def see(self, images: Tensor) -> Features:
        """See `Surrogate.see`."""
        return self.model.image(images)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Features:
        """See `Surrogate.read`."""
        return self.model.text(self.model.tokenize(captions))


@lru_cache(maxsize=2)
def load_surrogate(folder: str | Path) -> ModelSurrogate:
    """The finished model of the run in `folder`.

    Raises:
        UserError: no finished run there.
    """
    run = Path(folder)
    try:
        name = str(json.loads((run / "spec.json").read_text("utf-8"))["model"])
        return ModelSurrogate(load_two_tower(run, name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"surrogate {str(folder)!r}: expected the folder of a finished run, with spec.json and its model "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from None


@torch.no_grad()
def distances(surrogate: Surrogate, images: Tensor, captions: Sequence[str]) -> Tensor:
    """d of every image to every caption (METHOD section 1, the defence's own alpha and epsilon): `[n, m]`.

    `images [n, 3, H, W]`: floats in 0..1 at the surrogate's size.
    """
    text = surrogate.read(captions)
    every = torch.arange(len(captions))
    parts = []
    for batch in images.split(max(1, min(BATCH, COSTS // len(captions)))):
        seen = surrogate.see(batch)
        local = candidate_costs(seen, text, every.expand(len(batch), -1))
        parts.append((1 - LOCAL_SHARE) * (1 - seen.pooled @ text.pooled.T) + LOCAL_SHARE * local)
    return torch.cat(parts)
