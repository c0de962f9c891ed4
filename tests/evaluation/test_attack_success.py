"""Attack success by counting one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip.evaluation import backdoor_success, targeted_success

said_and_true = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(said_and_true, st.integers(0, 3))
def test_backdoor_counts_other_classes_called_the_target(rows: list[tuple[int, int]], target: int) -> None:
    judged = [said for said, true in rows if true != target]
    said, true = zip(*rows, strict=True)
    if not judged:
        with pytest.raises(ValueError, match="no trials"):
            backdoor_success(said, true, target)
        return
    rate = backdoor_success(said, true, target)
    assert (rate.successes, rate.n) == (judged.count(target), len(judged))
    assert rate.value == judged.count(target) / len(judged)


@given(said_and_true)
def test_targeted_counts_images_called_as_wanted(rows: list[tuple[int, int]]) -> None:
    said, wanted = zip(*rows, strict=True)
    rate = targeted_success(said, wanted)
    assert (rate.successes, rate.n) == (sum(a == b for a, b in rows), len(rows))


def test_a_target_image_of_the_target_class_is_no_success() -> None:
    assert backdoor_success([1, 1, 1, 0], [1, 1, 0, 0], target=1).value == 0.5


@pytest.mark.parametrize(("said", "other"), [([1, 2], [1]), ([[1]], [[1]])])
def test_lengths_must_agree(said: list, other: list) -> None:
    with pytest.raises(ValueError, match="two columns"):
        backdoor_success(said, other, 0)
    with pytest.raises(ValueError, match="two columns"):
        targeted_success(said, other)


def test_no_target_images_is_no_rate() -> None:
    with pytest.raises(ValueError, match="no trials"):
        targeted_success([], [])
