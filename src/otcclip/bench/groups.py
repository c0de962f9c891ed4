"""Attacks that are planted together: what a group's text stands for, and how much of it is planted.

parse_groups(["plain", "badnets+sig"])  ->  three groups, each of them one poisoned corpus
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from otcclip import attacks
from otcclip.errors import UserError
from otcclip.registry import find
from otcclip.specs import Spec, options_of, takes

NONE = "none"
# What a name stands for. Several triggers in one corpus are one training, but they also keep each other
# from being learned: so few in each that those with a chance reach 80 % undefended (docs/experiments.md).
ALIASES: dict[str, tuple[str, ...]] = {
    "plain": (
        "badnets+blended+sig+clean-label+targeted",
        "badnets:colours=blue-yellow,location=random,name=badnets-random+filter+wanet",
    ),
    "adaptive": ("tiled+mixed-captions+mimicry+jittered",),
}
MAX_RATE = 0.5


@dataclass(frozen=True)
class Group:
    """Attacks planted in one corpus; `label` is what tables and folders call it."""

    label: str
    attacks: tuple[str, ...]
    rate: float | None = None


def parse_group(text: str) -> Group:
    """`spec+spec+...`, or `none`.

    Raises:
        UserError: an unknown attack or option, or an empty group.
    """
    label = text.strip()
    if label == NONE:
        return Group(NONE, ())
    # A plus sign inside a value stays there unless an attack's name could follow it.
    specs = [Spec.parse(part) for part in re.split(r"\+(?=[A-Za-z])", label)]
    for spec in specs:
        if spec.name not in attacks.ATTACKS and spec.name in (NONE, *ALIASES):
            raise UserError(f"attack group {label!r}: {spec.name!r} stands for itself and joins no other")
        options_of("attack", attacks.ATTACKS, spec)
    return Group("+".join(map(str, specs)), tuple(map(str, specs)))


def parse_groups(texts: Sequence[str]) -> tuple[Group, ...]:
    """The groups that `texts` name, an alias standing for those it is short for.

    Raises:
        UserError: as `parse_group`.
    """
    return tuple(parse_group(one) for text in texts for one in ALIASES.get(text.strip(), (text,)))


def at_rate(group: Group, rate: float, pairs: int) -> Group:
    """`group` with every attack planting a share `rate` of `pairs` training pairs, or the least it can plant.

    An attack counted in copies of some images keeps its images and changes its copies: its least is a copy of each. One
    with several triggers has as many pairs of each.

    Raises:
        UserError: a rate outside (0, 0.5], an attack whose count is set already, or one that takes none.
    """
    if not 0 < rate <= MAX_RATE:
        raise UserError(f"--poison-rate {rate:g}: a share of the training pairs above 0, at most {MAX_RATE:g}")
    specs = tuple(str(_counted(Spec.parse(text), rate * pairs)) for text in group.attacks)
    return Group(f"{group.label}@{rate}", specs, rate)


def _counted(spec: Spec, count: float) -> Spec:
    member = find("attack", attacks.ATTACKS, spec.name)
    option = "count" if takes(member, "count") else "copies"
    if option == "copies" and not (takes(member, "copies") and takes(member, "images")):
        raise UserError(f"--poison-rate: attack {spec.name!r} takes no count of pairs")
    if option in spec:
        raise UserError(f"--poison-rate and {spec}: both set how much poison there is")
    if option == "copies":
        images = options_of("attack", attacks.ATTACKS, spec).get(
            "images", inspect.signature(member).parameters["images"].default
        )
        count /= images
    else:
        count /= getattr(member, "per_count", 1)
    return spec.with_options(**{option: max(1, round(count))})
