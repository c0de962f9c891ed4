"""Agreement of captions against an exact transport solver, and the marginals it moves."""

from __future__ import annotations

import numpy as np
import open_clip
import ot
import pytest
import torch
from torch import Tensor

from otcclip.errors import UserError
from otcclip.evidence.captions import caption_agreement, token_marginals

CAPTIONS = (
    "polar bear | animal, arctic",
    "brown bear | animal, forest",
    "arctic fox | animal, animal, animal",
    "banana | fruit, yellow",
    "banana split, ice cream",
    "red apple | fruit",
    "ice",
    "",
)


def tokens(*captions: str) -> Tensor:
    return open_clip.get_tokenizer("ViT-B-32")(list(captions))


def words(*captions: tuple[int, ...]) -> Tensor:
    """Token rows by hand: 100 starts, 200 ends, 0 pads to eight."""
    rows = [(100, *caption, 200) for caption in captions]
    return torch.tensor([[*row, *[0] * (8 - len(row))] for row in rows])


def test_agreement_is_one_minus_exact_transport() -> None:
    """POT's `emd2` under the metric that two tokens are equal or not, between the same marginals."""
    given = tokens(*CAPTIONS)
    marginals = token_marginals(given).astype(np.float64)
    got = caption_agreement(given)
    metric = 1.0 - np.eye(marginals.shape[1])
    for i in range(len(CAPTIONS) - 1):
        for j in range(len(CAPTIONS) - 1):
            a, b = marginals[i] / marginals[i].sum(), marginals[j] / marginals[j].sum()
            assert got[i, j] == pytest.approx(1 - ot.emd2(a, b, metric), abs=1e-5), (CAPTIONS[i], CAPTIONS[j])
    assert np.count_nonzero((got > 0.01) & (got < 0.99)) > 8, "an example in which nothing is shared tests nothing"


def test_marginals_are_inverse_document_frequencies() -> None:
    """Three captions over tokens 5, 6, 7; 5 is everywhere and weighs nothing, a repeated token counts once."""
    got = token_marginals(words((5, 6), (5, 6, 7, 7, 7), (5, 7)))
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, [[0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]], atol=1e-6)
    uneven = token_marginals(words((5, 6), (6,), (6,), (7,)))
    np.testing.assert_allclose(uneven[0, :2], np.log([4 / 1, 4 / 3]) / np.log(16 / 3), atol=1e-6)


def test_rows_sum_to_one_or_are_empty() -> None:
    got = token_marginals(tokens(*CAPTIONS))
    np.testing.assert_allclose(got.sum(axis=1), [1] * 7 + [0], atol=1e-6)
    assert (got >= 0).all()


def test_start_end_and_padding_are_no_words() -> None:
    """Had they a weight, captions without a word in common would agree."""
    given = words((5,), (6,), (7, 8), ())
    np.testing.assert_array_equal(caption_agreement(given), np.diag([1, 1, 1, 0]))


def test_agreement_is_symmetric_and_one_with_itself() -> None:
    got = caption_agreement(tokens(*CAPTIONS))
    np.testing.assert_allclose(got, got.T, atol=1e-7)
    np.testing.assert_allclose(np.diag(got), [1] * 7 + [0], atol=1e-6)
    assert got.min() >= 0 and got.max() <= 1 + 1e-6


@pytest.mark.parametrize("captions", [("banana",), ("",), ("banana", "")])
def test_few_or_empty_captions(captions: tuple[str, ...]) -> None:
    got = caption_agreement(tokens(*captions))
    assert got.shape == (len(captions),) * 2 and np.isfinite(got).all()


def test_too_many_captions_is_one_line() -> None:
    with pytest.raises(UserError, match=r"20,001 distinct captions"):
        caption_agreement(torch.zeros(20_001, 3, dtype=torch.int64))
