"""Members of a family as people write them: `name[:option=value,...]`.

    badnets                              the member with its defaults
    badnets:count=45,target=red apple    two options set
    multi:targets=banana/guitar          several values of one option, joined by slashes

One grammar for attacks and defences, on the command line and in `RunSpec`. An option's value is read by the type that
the member's constructor gives it. A comma or a colon inside a value stays part of it, unless a word and `=` follow the
comma: `target=family: man, woman` is one value.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from otcclip.errors import UserError
from otcclip.registry import Named, did_you_mean, find

M = TypeVar("M", bound=Named)
_NEXT_OPTION = re.compile(r",\s*(?=[A-Za-z_]\w*\s*=)")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Spec:
    """A member's name and the options set, as text, sorted by name: equal specs are written alike."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read `name[:option=value,...]`.

        Raises:
            UserError: no name, an option without `=`, without a name or without a value, or one set twice.
        """
        name, colon, rest = text.strip().partition(":")
        if not name.strip():
            raise UserError(f"{text!r}: expected name[:option=value,...], found no name")
        options: dict[str, str] = {}
        for part in _NEXT_OPTION.split(rest) if colon else ():
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not (equals and key and value):
                raise UserError(f"{text!r}: expected option=value after the colon, found {part.strip()!r}")
            if key in options:
                raise UserError(f"{text!r}: option {key!r} is set twice")
            options[key] = value
        return cls(name.strip(), tuple(sorted(options.items())))

    def __str__(self) -> str:
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in self.options) if self.options else "")

    def __contains__(self, option: str) -> bool:
        return option in dict(self.options)

    def with_options(self, **options: object) -> Spec:
        """This spec with `options` set; they replace those of the same name."""
        merged = {**dict(self.options), **{key: str(value) for key, value in options.items()}}
        return Spec(self.name, tuple(sorted(merged.items())))


def takes(member: Callable[..., Any], option: str) -> bool:
    """Whether the member's constructor has this option."""
    return option in inspect.signature(member).parameters


def options_of(family: str, members: Mapping[str, type[M]], spec: Spec) -> dict[str, Any]:
    """The spec's options with their values read by type.

    Raises:
        UserError: no such member (the message lists them), no such option (likewise), or a value that its type does
            not take.
    """
    member = find(family, members, spec.name)
    hints = get_type_hints(member.__init__)
    known = list(inspect.signature(member).parameters)
    values: dict[str, Any] = {}
    for key, text in spec.options:
        if key not in known:
            raise UserError(
                f"{family} {spec.name!r}: no option {key!r}{did_you_mean(key, known)}; "
                f"its options are: {', '.join(known) or 'none'}"
            )
        try:
            values[key] = _read(text, hints.get(key, str))
        except ValueError as error:
            raise UserError(f"{family} {spec.name!r}: option {key}: {error}") from None
    return values


def _read(text: str, kind: Any) -> Any:
    """`text` as a value of the type `kind`; ValueError says what was expected."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is bool:
        if text.lower() not in _WORDS:
            raise ValueError(f"expected true or false, got {text!r}")
        return _WORDS[text.lower()]
    if kind is int or kind is float:
        return _number(text, kind)
    if origin is Literal:
        if text not in inner:
            raise ValueError(f"expected one of {', '.join(map(str, inner))}, got {text!r}")
        return text
    if origin is tuple:
        return tuple(_read(part.strip(), inner[0]) for part in text.split("/"))
    if origin in (Union, types.UnionType):
        return _one_of(text, inner)
    if kind is str or kind is Any:
        return text
    raise ValueError("cannot be set in a spec, only from Python")


def _number(text: str, kind: type[int] | type[float]) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, got {text!r}")
    return value


def _one_of(text: str, kinds: tuple[Any, ...]) -> Any:
    """The first type of a union that reads `text`, text itself last."""
    if type(None) in kinds and text.lower() == "none":
        return None
    why = ""
    for kind in sorted((k for k in kinds if k is not type(None)), key=lambda k: k is str):
        try:
            return _read(text, kind)
        except ValueError as error:
            why = why or str(error)
    raise ValueError(why)
