"""What backdoor attacks have in common: some pairs of other classes, a trigger, real captions of the target class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from otcclip.attacks.base import PoisonContext, PoisonPlan, PoisonRecord, Replacement, rng_for
from otcclip.errors import UserError


class Backdoor(Protocol):
    """The options every backdoor has: the class its trigger shall mean, pairs to poison, its name in records."""

    @property
    def target(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def name(self) -> str: ...


def backdoor_plan(attack: Backdoor, corpus: PoisonContext, seed: int, *, pattern: str, location: str) -> PoisonPlan:
    """`count` training pairs of other classes than the target get the trigger and a real caption of the target.

    `pattern` and `location` say in the records what the trigger is and where. The trial is every test image of another
    class than the target.

    Raises:
        UserError: a target that is not in the corpus, or a count above the pairs of other classes.
    """
    corpus.require_name(attack.name, attack.target)
    rng = rng_for(attack.name, seed)
    victims = draw_victims(attack, corpus, rng)
    captions = corpus.captions_of(attack.target, attack.count, rng)
    return replacing(attack, corpus, seed, victims, captions, pattern=pattern, location=location)


def other_classes(attack: Backdoor, corpus: PoisonContext) -> list[int]:
    """Rows of the training pairs that are not of the target class.

    Raises:
        UserError: there are fewer than the attack's count.
    """
    others = [i for i, label in enumerate(corpus.train.labels) if label != attack.target]
    if attack.count > len(others):
        raise UserError(
            f"{attack.name}: count {attack.count} is more than the {len(others)} training pairs that are not "
            f"{attack.target!r}"
        )
    return others


def draw_victims(attack: Backdoor, corpus: PoisonContext, rng: np.random.Generator) -> list[int]:
    """`count` rows of training pairs of other classes than the target, without repetition."""
    others = other_classes(attack, corpus)
    return [others[i] for i in rng.choice(len(others), attack.count, replace=False)]


def replacing(
    attack: Backdoor,
    corpus: PoisonContext,
    seed: int,
    victims: Sequence[int],
    captions: Sequence[str],
    *,
    pattern: str,
    location: str,
) -> PoisonPlan:
    """The plan that lays the trigger on the training pairs `victims` and puts `captions` under them, one each."""
    train = corpus.train
    return PoisonPlan(
        attack=attack.name,
        target=attack.target,
        replaced=tuple(Replacement(train.keys[i], caption) for i, caption in zip(victims, captions, strict=True)),
        added=(),
        records=tuple(
            PoisonRecord(train.keys[i], attack.name, pattern, location, attack.target, seed, train.captions[i])
            for i in victims
        ),
        trial=corpus.backdoor_trial(attack.name, attack.target),
    )
