"""`name[:option=value,...]`: one grammar, values read by type, what is wrong in one line."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip import attacks, defenses
from otcclip.errors import UserError
from otcclip.registry import registry
from otcclip.specs import Spec, options_of, takes


class Widget:
    name = "widget"

    def __init__(
        self,
        target: str = "",
        count: int = 1,
        rate: float = 0.5,
        loud: bool = False,
        level: float | None = None,
        side: Literal["left", "right"] = "left",
        names: tuple[str, ...] = (),
        sizes: tuple[int, ...] = (),
        hook: dict[str, int] | None = None,
    ) -> None: ...


FAMILY = registry("widget", (Widget,))
words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
# What a class name may hold: commas, colons and blanks too, but no `, word=`, which starts the next option.
values = st.from_regex(r"[A-Za-z0-9.:/-]([A-Za-z0-9.:, /-]{0,12}[A-Za-z0-9.:/-])?", fullmatch=True)


@given(words, st.dictionaries(words, values, max_size=4))
def test_what_is_written_is_read_back(name: str, options: dict[str, str]) -> None:
    spec = Spec(name, tuple(sorted(options.items())))
    assert Spec.parse(str(spec)) == spec
    shuffled = ",".join(f"{k}={v}" for k, v in reversed(spec.options))
    assert Spec.parse(f"{name}:{shuffled}" if options else name) == spec, "order does not matter"


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        spec = Spec.parse(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert spec.name and all(key and value for key, value in spec.options)
        assert Spec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("widget", {}),
        ("widget:count=45,target=guitar", {"count": 45, "target": "guitar"}),
        ("widget:target=family: man, woman,count=2", {"target": "family: man, woman", "count": 2}),
        ("widget:rate=.5,loud=yes", {"rate": 0.5, "loud": True}),
        ("widget:loud=False,level=none", {"loud": False, "level": None}),
        ("widget:level=1e-3,side=right", {"level": 1e-3, "side": "right"}),
        ("widget:names=red apple/banana,sizes=1/2/3", {"names": ("red apple", "banana"), "sizes": (1, 2, 3)}),
        (" widget : count = 3 , rate = 2 ", {"count": 3, "rate": 2.0}),
    ],
)
def test_values_are_read_by_type(text: str, options: dict[str, Any]) -> None:
    found = options_of("widget", FAMILY, Spec.parse(text))
    assert found == options
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in options.items()}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found no name"),
        (":count=1", "found no name"),
        ("widget:", "expected option=value after the colon, found ''"),
        ("widget:count", "found 'count'"),
        ("widget:count=", "found 'count='"),
        ("widget:count=1,count=2", "option 'count' is set twice"),
        ("widgit:count=1", "unknown widget 'widgit'; did you mean 'widget'"),
        ("widget:cuont=1", "no option 'cuont'; did you mean 'count'.*its options are: target, count"),
        ("widget:count=1.5", "option count: expected a whole number, got '1.5'"),
        ("widget:rate=nan", "option rate: expected a number, got 'nan'"),
        ("widget:rate=inf", "option rate: expected a number"),
        ("widget:loud=maybe", "option loud: expected true or false"),
        ("widget:side=up", "option side: expected one of left, right, got 'up'"),
        ("widget:sizes=1/two", "option sizes: expected a whole number, got 'two'"),
        ("widget:hook=1", "option hook: cannot be set in a spec"),
    ],
)
def test_what_is_wrong_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as raised:
        options_of("widget", FAMILY, Spec.parse(text))
    assert "\n" not in str(raised.value)


def test_with_options_replaces_and_keeps() -> None:
    spec = Spec.parse("widget:count=1,target=a").with_options(count=2, rate=0.5)
    assert spec == Spec.parse("widget:rate=0.5,count=2,target=a")
    assert "rate" in spec and "loud" not in spec and takes(Widget, "loud") and not takes(Widget, "spin")


@pytest.mark.parametrize("name", [*attacks.ATTACKS, *defenses.DEFENSES])
def test_every_option_of_every_member_can_be_written(name: str) -> None:
    """Defaults written as text are read back as they are, whoever adds a member."""
    import inspect

    family = attacks.ATTACKS if name in attacks.ATTACKS else defenses.DEFENSES
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(family[name]).parameters.items()
        if parameter.default not in (inspect.Parameter.empty, "", ())
    }
    written = {k: "/".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in defaults.items()}
    spec = Spec(name, tuple(sorted(written.items())))
    assert options_of("member", family, spec) == defaults
