"""Hit@K and MinRank of a label swap: by brute force, at the two extremes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.evaluation import swap_success


def test_equals_sorting_by_hand() -> None:
    rng = np.random.default_rng(0)
    images, texts = (torch.from_numpy(rng.normal(size=(n, 8)).astype(np.float32)) for n in (60, 40))
    image_class, text_class = rng.integers(0, 6, 60), rng.integers(0, 6, 40)
    found = swap_success(images, image_class, texts, text_class, [(0, 1), (2, 3)]).swapped
    places = []
    for seen, said in ((0, 1), (2, 3)):
        for t in np.flatnonzero(text_class == said):
            order = sorted(range(60), key=lambda i, t=t: -float(F.cosine_similarity(images[i], texts[t], dim=0)))
            places.append(1 + next(at for at, i in enumerate(order) if image_class[i] == seen))
    assert found.min_rank == pytest.approx(np.mean(places))
    for k, rate in ((1, found.hit_at_1), (5, found.hit_at_5), (10, found.hit_at_10)):
        assert (rate.successes, rate.n) == (sum(place <= k for place in places), len(places))


def test_a_swap_that_was_learned_and_one_that_was_not() -> None:
    basis = torch.eye(4)
    names = [0, 1, 2, 3]
    learned = swap_success(basis[[1, 0, 2, 3]], names, basis, names, [(0, 1)])
    assert learned.swapped.hit_at_1.value == 1 and learned.swapped.min_rank == 1
    assert learned.random.hit_at_1.value == 0
    honest = swap_success(basis, names, basis, names, [(0, 1)])
    # Ties go before it: 0 for class 1, level with the two others.
    assert honest.swapped.min_rank == 4 and honest.swapped.hit_at_1.value == 0


def test_a_collapsed_model_succeeds_at_nothing() -> None:
    found = swap_success(torch.ones(20, 3), [0] + [1] * 19, torch.ones(5, 3), [1, 1, 2, 2, 3], [(0, 1)])
    assert found.swapped.min_rank == found.random.min_rank == 20
    assert found.swapped.hit_at_10.value == found.random.hit_at_10.value == 0


def test_random_texts_are_of_neither_class_and_follow_the_seed() -> None:
    images = torch.eye(6)
    texts = torch.eye(6)[[0, 1, 1, 2, 3, 4, 5]]
    text_class = [0, 1, 1, 2, 3, 4, 5]
    # Texts of 0 would bring up the image of 0 first: the random ones never do.
    for seed in range(20):
        assert swap_success(images, range(6), texts, text_class, [(0, 1)], seed).random.hit_at_1.successes == 0


def test_what_cannot_be_measured_is_refused() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    for swaps in ([], [(9, 1)], [(0, 9)]):
        with pytest.raises(ValueError, match="swap"):
            swap_success(images, [0, 1, 2], texts, [0, 1, 2], swaps)
    with pytest.raises(ValueError, match="images: 3"):
        swap_success(images, [0, 1], texts, [0, 1, 2], [(0, 1)])
