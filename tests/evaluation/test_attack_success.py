"""Attack success by counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip.evaluation import targeted_success

said_and_true = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(said_and_true)
def test_targeted_counts_images_called_as_wanted(rows: list[tuple[int, int]]) -> None:
    said, wanted = zip(*rows, strict=True)
    rate = targeted_success(said, wanted)
    assert (rate.successes, rate.n) == (sum(a == b for a, b in rows), len(rows))


@pytest.mark.parametrize(("said", "other"), [([1, 2], [1]), ([[1]], [[1]])])
def test_lengths_must_agree(said: list, other: list) -> None:
    with pytest.raises(ValueError, match="two columns"):
        targeted_success(said, other)


def test_no_target_images_is_no_rate() -> None:
    with pytest.raises(ValueError, match="no trials"):
        targeted_success([], [])
