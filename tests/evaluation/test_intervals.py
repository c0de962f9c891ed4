"""Wilson intervals against published values, their defining equation, and what any interval must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip.evaluation import Rate, wilson
from otcclip.evaluation.intervals import Z95

trials = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17,
        # 1998, table I, method 3 (score, no continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_nothing_of_sixteen() -> None:
    # Closed form at zero successes: z^2 / (n + z^2).
    low, high = wilson(0, 16)
    assert low == 0.0 and high == pytest.approx(Z95**2 / (16 + Z95**2))
    assert wilson(16, 16) == (pytest.approx(1 - high), 1.0)


@given(trials)
def test_the_ends_solve_the_score_equation(trial: tuple[int, int]) -> None:
    successes, n = trial
    share = successes / n
    for end in wilson(successes, n):
        assert abs(share - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / n), abs=1e-9)


@given(trials)
def test_contains_the_value_and_stays_in_range(trial: tuple[int, int]) -> None:
    rate = Rate.of(*trial)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high
    assert rate.successes == trial[0]


@given(trials)
def test_is_symmetric(trial: tuple[int, int]) -> None:
    successes, n = trial
    low, high = wilson(successes, n)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(trials)
def test_is_monotone(trial: tuple[int, int]) -> None:
    successes, n = trial
    low, high = wilson(successes, n)
    if successes < n:
        more = wilson(successes + 1, n)
        assert more[0] > low and more[1] > high
    wider = wilson(successes, n)
    narrower = wilson(2 * successes, 2 * n)
    assert narrower[1] - narrower[0] < wider[1] - wider[0]


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_refuses_what_is_no_rate(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson(successes, n)


def test_as_dict_is_what_the_files_hold() -> None:
    rate = Rate.over(np.array([True, False, False, True]))
    assert rate.as_dict() == {"asr": 0.5, "n": 4, "low": rate.low, "high": rate.high}
