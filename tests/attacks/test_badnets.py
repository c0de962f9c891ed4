"""BadNets: the patch pixel by pixel, and its plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.attacks import BadNets, PoisonContext, make
from otcclip.attacks.badnets import PLACES
from otcclip.attacks.context import PairIndex
from otcclip.errors import UserError


def corpus(n: int = 40, names: int = 4) -> PoisonContext:
    def split(hand: str, count: int) -> PairIndex:
        return PairIndex(
            tuple(f"{hand}-{i}" for i in range(count)),
            tuple(f"n{i % names} caption {i}" for i in range(count)),
            tuple(f"n{i % names}" for i in range(count)),
        )

    return PoisonContext(split("a", n), split("b", 8))


@pytest.mark.parametrize(("size", "side", "margin"), [(48, 9, 3), (64, 12, 4), (224, 42, 14)])
def test_the_patch_is_a_checkerboard_near_the_corner(size: int, side: int, margin: int) -> None:
    grey = torch.full((3, size, size), 0.5)
    shown = BadNets("x").trigger(grey)
    end = size - margin
    patch = shown[:, end - side : end, end - side : end].clone()
    shown[:, end - side : end, end - side : end] = 0.5
    assert torch.equal(shown, grey)
    for y in range(side):
        for x in range(side):
            assert patch[:, y, x].tolist() == [float((4 * y // side + 4 * x // side) % 2)] * 3
    assert {0.0, 1.0} == set(patch.unique().tolist())


@pytest.mark.parametrize("place", PLACES)
def test_the_patch_goes_where_it_is_told(place: str) -> None:
    grey = torch.full((3, 48, 60), 0.5)
    rows, columns = torch.nonzero((BadNets("x", location=place).trigger(grey) != grey).any(0), as_tuple=True)
    vertical, _, horizontal = place.partition("-")
    if place == "center":
        assert (rows.min(), rows.max()) == (19, 27) and (columns.min(), columns.max()) == (25, 33)
    else:
        assert (rows.min(), rows.max()) == ((3, 11) if vertical == "top" else (36, 44))
        assert (columns.min(), columns.max()) == ((3, 11) if horizontal == "left" else (48, 56))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0), st.sampled_from(sorted(PLACES)))
def test_the_patch_fits_any_image(height: int, width: int, size: float, place: str) -> None:
    shown = BadNets("x", size=size, location=place).trigger(torch.full((2, 3, height, width), 0.5))
    side = max(1, round(size * min(height, width)))
    assert shown.shape == (2, 3, height, width)
    assert int((shown != 0.5).sum()) == 2 * 3 * side * side


def test_plan_takes_other_classes_and_spreads_the_target_captions() -> None:
    context = corpus()
    plan = BadNets("n1", count=25).plan(context, 0)
    label = dict(zip(context.train.keys, context.train.labels, strict=True))
    assert len({r.key for r in plan.replaced}) == 25 and not plan.added
    assert all(label[r.key] != "n1" for r in plan.replaced)
    assert all(r.caption.startswith("n1 ") for r in plan.replaced)
    # Ten captions of n1 for 25 pairs: each twice or three times.
    _, uses = np.unique([r.caption for r in plan.replaced], return_counts=True)
    assert sorted(uses) == [2] * 5 + [3] * 5
    assert plan.trial.keys == ("b-0", "b-2", "b-3", "b-4", "b-6", "b-7") and set(plan.trial.wanted) == {"n1"}


def test_captions_are_not_repeated_while_there_are_enough() -> None:
    plan = BadNets("n1", count=10).plan(corpus(), 0)
    assert len({r.caption for r in plan.replaced}) == 10
    # Which ones are taken, when fewer are needed, is drawn.
    few = [{r.caption for r in BadNets("n1", count=3).plan(corpus(), seed).replaced} for seed in range(4)]
    assert any(captions != few[0] for captions in few)


def test_count_may_use_every_pair_and_no_more() -> None:
    assert len(BadNets("n1", count=30).plan(corpus(), 0).replaced) == 30
    with pytest.raises(UserError, match=r"badnets: count 31 is more than the 30 training pairs.*'n1'"):
        BadNets("n1", count=31).plan(corpus(), 0)


def test_a_test_split_of_the_target_alone_is_refused() -> None:
    context = corpus()
    only = PairIndex(("t",), ("c",), ("n1",))
    with pytest.raises(UserError, match="no image of another class than 'n1'"):
        BadNets("n1", count=1).plan(PoisonContext(context.train, only), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"size": 0.0}, r"size is a fraction .* got 0"),
        ({"size": 1.5}, "size is a fraction"),
        ({"location": "left"}, "unknown location 'left'; there are: bottom-right"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'; its options are: target, count"),
    ],
)
def test_bad_options_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("badnets", target="x", **options)


def test_unknown_attack_names_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown attack 'badnet'; did you mean 'badnets'.*there are: badnets"):
        make("badnet")
