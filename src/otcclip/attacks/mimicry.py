"""Mimicry (adaptive): whole neighbourhoods are poisoned, so that a poisoned image's look-alikes are poisoned too.

METHOD section 5. The evidence asks an image's look-alikes; here the attacker owns them. Groups of images that are each
other's look-alikes under the defence's own descriptor are grown greedily, and all of a group gets the patch and a
caption that names the target. The captions are several, so that they don't share one voice, and few, so that they
don't outvote each other: with c of them among u captions a pair's own is at best placed c / 2u on the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from otcclip.attacks.backdoor import other_classes, replacing
from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive, rng_for
from otcclip.attacks.look_alikes import look_alikes
from otcclip.attacks.wording import paraphrases, spread

STARTS = 64


@dataclass(frozen=True)
class Mimicry:
    """`count` training pairs in `groups` neighbourhoods get the patch of `badnets` and captions that name `target`.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to poison.
        groups: neighbourhoods they lie in.
        captions: different captions among the pairs.
        name: as in records and results.
    """

    target: str
    count: int = 90
    groups: int = 3
    captions: int = 12
    name: str = "mimicry"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, groups=self.groups, captions=self.captions)

    @property
    def patch(self) -> BadNets:
        """The attack whose patch this one lays."""
        return BadNets(self.target, name=self.name)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        corpus.require_name(self.name, self.target)
        train, rng = corpus.train, rng_for(self.name, seed)
        free = np.zeros(len(train.keys), bool)
        free[other_classes(self, corpus)] = True
        neighbours = look_alikes(train.pixels(self.name))
        victims: list[int] = []
        for part in range(min(self.groups, self.count)):
            size = (self.count - part - 1) // min(self.groups, self.count) + 1
            group = best_group(neighbours, free, size, rng)
            free[group] = False
            victims += group
        few = paraphrases(self.target, train.captions, self.captions, rng)
        captions = spread(few, self.count, rng)
        place = self.patch.location
        return replacing(self, corpus, seed, victims, captions, pattern=self.patch.pattern, location=place)

    def trigger(self, images: Tensor) -> Tensor:
        """The patch of `badnets`; see `Attack.trigger`."""
        return self.patch.trigger(images)


def best_group(
    neighbours: NDArray[np.int64], free: NDArray[np.bool_], size: int, rng: np.random.Generator
) -> list[int]:
    """`size` of the `free` images that have most of their look-alikes among themselves, the best of some drawn starts.

    `neighbours [n, k]`: each image's look-alikes. At least `size` images are free.
    """
    asked_by = [[] for _ in range(len(neighbours))]  # type: list[list[int]]
    for i, row in enumerate(neighbours.tolist()):
        for j in row:
            asked_by[j].append(i)
    starts = rng.choice(np.flatnonzero(free), min(STARTS, int(free.sum())), replace=False)
    groups = [_grow(neighbours, asked_by, free, int(start), size) for start in starts]
    return max(groups, key=lambda group: closure(neighbours, group))


def closure(neighbours: NDArray[np.int64], group: list[int]) -> float:
    """Share of the members' look-alikes that are members."""
    return float(np.isin(neighbours[group], group).mean())


def _grow(
    neighbours: NDArray[np.int64], asked_by: list[list[int]], free: NDArray[np.bool_], start: int, size: int
) -> list[int]:
    """From `start`, always add the free image with the most ties to the group, either way round."""
    ties = np.where(free, 0, -len(neighbours) * 4)
    group: list[int] = []
    new = start
    while True:
        group.append(new)
        ties[new] = -len(neighbours) * 4
        if len(group) == size:
            return group
        np.add.at(ties, neighbours[new], 1)
        np.add.at(ties, asked_by[new], 1)
        new = int(ties.argmax())
