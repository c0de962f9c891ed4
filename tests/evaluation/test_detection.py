"""Detection figures by their definitions, counted pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.evaluation import detection

# Small integers: plenty of ties.
scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({flag for _, flag in rows}) == 2
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_figures_are_their_definitions(rows: list[tuple[int, bool]]) -> None:
    scores, poison = zip(*rows, strict=True)
    got = detection(scores, poison)
    bad = [s for s, p in rows if p]
    good = [s for s, p in rows if not p]
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    assert got.auroc == pytest.approx(wins / (len(bad) * len(good)))
    fpr, precision = 1.0, 0.0
    last = 0.0
    for cut in sorted(set(scores), reverse=True):
        caught, flagged = sum(b >= cut for b in bad) / len(bad), sum(g >= cut for g in good)
        if caught >= 0.95:
            fpr = min(fpr, flagged / len(good))
        precision += (caught - last) * (caught * len(bad)) / (caught * len(bad) + flagged)
        last = caught
    assert got.fpr95 == pytest.approx(fpr)
    assert got.aupr == pytest.approx(precision)
    assert (got.poison, got.honest) == (len(bad), len(good))


def test_higher_is_more_suspicious() -> None:
    poison = [True] * 20 + [False] * 80
    right = detection(np.arange(100)[::-1], poison)
    assert (right.auroc, right.aupr, right.fpr95) == (1.0, 1.0, 0.0)
    wrong = detection(np.arange(100), poison)
    assert (wrong.auroc, wrong.fpr95) == (0.0, 1.0) and wrong.aupr < 0.2


def test_one_straggler_of_twenty_may_be_missed() -> None:
    scores = [*[10.0] * 19, -1.0, *[0.0] * 50]
    assert detection(scores, [True] * 20 + [False] * 50).fpr95 == 0.0
    assert detection(scores[1:], [True] * 19 + [False] * 50).fpr95 == 1.0


@pytest.mark.parametrize(
    ("scores", "poison", "message"),
    [
        ([1.0, 2.0], [True], "scores"),
        ([1.0, np.nan], [True, False], "not finite"),
        ([1.0, 2.0], [True, True], "2 of 2 pairs are poison"),
        ([1.0, 2.0], [False, False], "0 of 2 pairs are poison"),
    ],
)
def test_refuses_what_can_not_be_judged(scores: list, poison: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detection(scores, poison)
