"""Recall at k by brute force over every query and answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.evaluation import retrieval

# Unit axes and their opposites: similarities are exact in float32 (-1, 0, 1) and ties are plenty.
corners = torch.cat([torch.eye(2), -torch.eye(2)])


def brute(scores: np.ndarray, right: np.ndarray, k: int) -> float:
    hits = 0
    for row, good in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
        hits += any(good[j] for j in order[:k])
    return hits / len(scores)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(0, 8), st.integers(1, 20))
def test_is_brute_force(data: st.DataObject, n: int, more: int, batch: int) -> None:
    m = n + more
    draw = lambda size, top: data.draw(st.lists(st.integers(0, top), min_size=size, max_size=size))  # noqa: E731
    images, texts = corners[draw(n, 3)], corners[draw(m, 3)]
    captions = [f"caption {i}" for i in draw(m, 5)]
    owner = [*range(n), *draw(more, n - 1)]
    got = retrieval(images, texts, captions, owner, batch=batch)
    scores = (images @ texts.T).numpy()
    own = [{captions[t] for t in range(m) if owner[t] == i} for i in range(n)]
    right = np.array([[captions[t] in own[i] for t in range(m)] for i in range(n)])
    assert got.text_at_1.value == brute(scores, right, 1)
    assert got.text_at_5.value == brute(scores, right, 5)
    assert got.image_at_1.value == brute(scores.T, right.T, 1)
    assert got.image_at_5.value == brute(scores.T, right.T, 5)
    assert (got.text_at_1.n, got.image_at_1.n) == (n, m)


def test_a_perfect_model_finds_everything() -> None:
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    got = retrieval(3 * features, features)
    assert [r.value for r in (got.text_at_1, got.text_at_5, got.image_at_1, got.image_at_5)] == [1.0] * 4


def test_a_collapsed_model_finds_nothing() -> None:
    same = torch.tensor([[1.0, 0.0]]).repeat(20, 1)
    got = retrieval(same, same)
    assert [r.value for r in (got.text_at_1, got.text_at_5, got.image_at_1, got.image_at_5)] == [0.0] * 4


def test_the_same_caption_of_another_image_is_right() -> None:
    images = torch.eye(2)
    swapped = images.flip(0)
    assert retrieval(images, swapped).text_at_1.value == 0.0
    twins = retrieval(images, swapped, ["a cat", "a cat"])
    assert twins.text_at_1.value == twins.image_at_1.value == 1.0


@pytest.mark.parametrize(
    ("images", "texts", "captions", "owner", "message"),
    [
        (torch.eye(3), torch.eye(4)[:, :3], None, None, "each of the 3 images"),
        (torch.eye(3), torch.eye(3), ["a"], None, "captions that don't fit"),
        (torch.eye(3), torch.eye(3), None, [0, 1], "owners"),
        (torch.eye(3), torch.eye(3), None, [0, 1, 1], "each of the 3 images"),
        (torch.eye(3), torch.eye(3), None, [0, 1, 3], "each of the 3 images"),
        (torch.eye(0), torch.eye(0), None, None, "0 texts"),
        (torch.eye(2) * torch.nan, torch.eye(2), None, None, "not finite"),
    ],
)
def test_refuses_what_can_not_be_judged(images, texts, captions, owner, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval(images, texts, captions, owner)
