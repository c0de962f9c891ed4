"""What an attack is: a plan of poison, a trigger, and the trial its success is measured on.

An attack reads a corpus through `PoisonContext` and writes down what it would do as a `PoisonPlan`;
`poison` (in `attacks.planting`) carries the plan out. The plan holds the ground truth, and only the plan:
nothing in a poisoned corpus tells a planted pair from an honest one. A new attack is one file with a frozen
dataclass like `BadNets` and one entry in `attacks.ATTACKS`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from otcclip.attacks.context import PairIndex, PoisonContext
from otcclip.attacks.plans import Addition, PoisonPlan, PoisonRecord, Replacement, Trial
from otcclip.errors import UserError

__all__ = [
    "Addition",
    "Attack",
    "PairIndex",
    "PoisonContext",
    "PoisonPlan",
    "PoisonRecord",
    "Replacement",
    "Trial",
    "check_positive",
    "rng_for",
    "unique_names",
]


def rng_for(attack: str, seed: int) -> np.random.Generator:
    """The generator of one attack under one seed: adding another attack to a run doesn't change its draws."""
    return np.random.default_rng([seed, zlib.crc32(attack.encode())])


@runtime_checkable
class Attack(Protocol):
    """One way of poisoning a corpus. Members are frozen dataclasses; `name` tells two instances in a run
    apart. Every backdoor takes `target`, `count` and `name`; one that looks into a model asks
    `PoisonContext.require_surrogate`.

    `trigger` takes `[..., 3, H, W]` floats in 0..1 and returns the same shape, type and range; it is one
    function at training and at test, leaves its input as it is, and treats each image on its own (a batch
    gives what its images give one by one). Where an attack wants a random place, it draws it from the
    image's content. With `has_trigger` False it is the identity.

    A class whose `count` is not the pairs it plants says in `per_count` how many it plants for each.
    """

    @property
    def name(self) -> str: ...

    @property
    def has_trigger(self) -> bool: ...

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """The poison for `corpus`: the same plan for the same corpus and seed.

        Raises:
            UserError: a target that is not in the corpus, or more poison than there are pairs.
        """
        ...

    def trigger(self, images: Tensor) -> Tensor: ...


def check_positive(attack: str, **counts: int) -> None:
    """Raises UserError for a count below one."""
    for option, value in counts.items():
        if value < 1:
            raise UserError(f"{attack}: {option} must be at least 1, got {value}")


def unique_names(attacks: Sequence[Attack]) -> None:
    """Raises UserError if two attacks of a run share a name: their records could not be told apart."""
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attack {name!r} is named {names.count(name)} times in one run; give each its own name")
