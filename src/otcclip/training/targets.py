"""The classes that a run's attacks argue for.

Several attacks in one corpus need a class each: a rate under one trigger says nothing if another attack has taught the
model the same class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from otcclip import attacks
from otcclip.attacks.base import rng_for
from otcclip.data.emoji_load import EmojiSplit
from otcclip.errors import UserError
from otcclip.registry import find
from otcclip.specs import Spec, takes


def give_targets(specs: Sequence[Spec], split: EmojiSplit, first: str, seed: int) -> list[Spec]:
    """`specs` with a target for each that takes one and names none.

    The first of them gets `first`. Each of the others gets a class that nobody else in the run has, drawn by the seed
    and its own name among the classes with at least as many training images as `first` and a test image. A draw does
    not depend on attacks named later, so adding one at the end changes no target.

    Raises:
        UserError: an unknown attack, or fewer such classes than attacks.
    """
    wanting = [i for i, spec in enumerate(specs) if _wants(spec)]
    taken = {dict(spec.options).get("target", "") for spec in specs}
    given = list(specs)
    for place, i in enumerate(wanting):
        free = first if place == 0 and first not in taken else _draw(specs[i], split, first, seed, taken)
        given[i] = specs[i].with_options(target=free)
        taken.add(free)
    return given


def _wants(spec: Spec) -> bool:
    member = find("attack", attacks.ATTACKS, spec.name)
    return takes(member, "target") and "target" not in spec


def _draw(spec: Spec, split: EmojiSplit, first: str, seed: int, taken: set[str]) -> str:
    trained, tested = Counter(split.train.labels), Counter(split.test.labels)
    fit = sorted(name for name, n in trained.items() if n >= trained[first] and tested[name] and name not in taken)
    if not fit:
        raise UserError(
            f"{spec.name}: no class is left for a target of its own: none of the {len(trained)} has {trained[first]} "
            "training images and a test image; name one with target=..."
        )
    own_name = dict(spec.options).get("name", spec.name)
    return fit[int(rng_for(f"target of {own_name}", seed).integers(len(fit)))]
