"""A family's registry: a literal tuple of classes turned into a mapping by name.

    ATTACKS = registry("attack", (BadNets, Targeted))
    attack = make("attack", ATTACKS, "badnets", target="banana")

Adding a member is one file and one entry in that tuple. A name registered twice raises at import.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from otcclip.errors import UserError


class Named(Protocol):
    """Whatever a registry holds: a class with a `name`."""

    name: str


M = TypeVar("M", bound=Named)


def registry(family: str, members: Iterable[type[M]]) -> Mapping[str, type[M]]:
    """`members` by their class attribute `name`, in the order given; read-only.

    Raises:
        ValueError: a name that is empty, or given by two members.
    """
    found: dict[str, type[M]] = {}
    for member in members:
        name = getattr(member, "name", None)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{family} {member.__name__}: has no class attribute `name`")
        if name in found:
            raise ValueError(
                f"{family} {name!r} is registered twice: {found[name].__qualname__}, {member.__qualname__}"
            )
        found[name] = member
    return MappingProxyType(found)


def find(family: str, members: Mapping[str, type[M]], name: str) -> type[M]:
    """The member called `name`.

    Raises:
        UserError: no such member; names every member there is.
    """
    if name not in members:
        raise UserError(f"unknown {family} {name!r}{did_you_mean(name, members)}; there are: {', '.join(members)}")
    return members[name]


def make(family: str, members: Mapping[str, type[M]], name: str, /, **options: Any) -> M:
    """An instance of the member called `name`, built with `options`.

    Raises:
        UserError: no such member, or an option that it does not take or that is missing.
    """
    member = find(family, members, name)
    signature = inspect.signature(member)
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters)
        raise UserError(f"{family} {name!r}: {error}; its options are: {takes}") from None
    return member(**options)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x' or 'y'?"` for the closest of `known`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
