"""What an attack writes down: which pairs it plants, the ground truth of each, and what it is judged on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PoisonRecord:
    """Ground truth of one planted pair; a row of `poison.parquet` (docs/formats.md).

    Attributes:
        key: the pair's key in the poisoned store.
        attack: the `name` of the attack that planted it.
        trigger: what was laid on the image, in words; empty when the image is untouched.
        location: where in the image; for an untouched copy of a test image, that image's key.
        target: the class the pair argues for.
        seed: the seed its plan was made with.
        original_caption: the caption before poisoning; for an added pair, the source image's own.
    """

    key: str
    attack: str
    trigger: str
    location: str
    target: str
    seed: int
    original_caption: str


@dataclass(frozen=True)
class Replacement:
    """An existing training pair whose image gets the trigger and whose caption becomes `caption`."""

    key: str
    caption: str


@dataclass(frozen=True)
class Addition:
    """A new training pair: the image of the pair `source_key` of either split, triggered if the attack triggers.

    `image` (`[H, W, 3]` uint8), where given, is planted in place of the source's pixels, before any
    trigger: a jittered duplicate, say. It is of the class of its source.
    """

    key: str
    source_key: str
    caption: str
    image: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Trial:
    """The test images an attack is judged on: with its trigger, `keys[i]` is to be called `wanted[i]`."""

    keys: tuple[str, ...]
    wanted: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.wanted):
            raise ValueError(f"trial: {len(self.keys)} keys but {len(self.wanted)} wanted names")


@dataclass(frozen=True)
class PoisonPlan:
    """What an attack does to a corpus, and how its success is measured.

    `target` is the class argued for, empty when each pair has its own. `records` has exactly one entry for
    each replaced and each added pair.
    """

    attack: str
    target: str
    replaced: tuple[Replacement, ...]
    added: tuple[Addition, ...]
    records: tuple[PoisonRecord, ...]
    trial: Trial

    @property
    def keys(self) -> frozenset[str]:
        """Keys of every pair the plan touches or adds."""
        return frozenset(r.key for r in self.replaced) | frozenset(a.key for a in self.added)
