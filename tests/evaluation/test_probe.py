"""The linear probe on features whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip.evaluation.probe import halves, linear_probe


def clouds(per_class: int, spread: float, seed: int, classes: int = 4) -> tuple[Tensor, list[str]]:
    """Points about the corners of a simplex: a straight cut tells them apart as far as `spread` lets it."""
    rng = np.random.default_rng(seed)
    kind = np.arange(classes * per_class) % classes
    points = np.eye(classes, 8)[kind] + spread * rng.standard_normal((len(kind), 8))
    return torch.from_numpy(points).float(), [f"class {k}" for k in kind]


def test_what_a_straight_cut_tells_is_told() -> None:
    found = linear_probe(*clouds(25, 0.05, 0), *clouds(10, 0.05, 1))
    assert found.accuracy.value == 1.0 and (found.accuracy.n, found.trained, found.classes) == (40, 100, 4)
    assert found.accuracy.low < 1.0 == found.accuracy.high


def test_noise_stays_at_chance() -> None:
    """Also where the training part is learned by heart: 8 dimensions, 40 images."""
    rng = np.random.default_rng(0)
    x, seen = (torch.from_numpy(rng.standard_normal((n, 8))).float() for n in (40, 4000))
    found = linear_probe(x, [f"{i % 4}" for i in range(40)], seen, [f"{i % 4}" for i in range(4000)])
    assert found.accuracy.low - 0.02 < 0.25 < found.accuracy.high + 0.02


def test_the_test_part_chooses_nothing() -> None:
    """Strength and fit are the training part's alone, whatever is tested on."""
    x, y = clouds(25, 0.5, 0)
    seen, truth = clouds(200, 0.5, 1)
    whole = linear_probe(x, y, seen, truth)
    first, second = (linear_probe(x, y, seen[part], truth[part]) for part in (slice(400), slice(400, 800)))
    assert first.strength == second.strength == whole.strength
    assert first.accuracy.successes + second.accuracy.successes == whole.accuracy.successes


def test_a_hidden_copy_of_the_label_is_no_help_to_others() -> None:
    """A feature that gives the class away in the training part and is noise in the test part."""
    rng = np.random.default_rng(0)
    x, y = clouds(25, 2.0, 0)
    seen, truth = clouds(250, 2.0, 1)
    given_away = torch.cat([x, torch.eye(4)[torch.arange(len(x)) % 4] * 50], 1)
    noise = torch.cat([seen, torch.from_numpy(rng.standard_normal((len(seen), 4))).float() * 50], 1)
    assert linear_probe(given_away, y, noise, truth).accuracy.value < 0.35


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x[:-1], y), "features .* labels"),
        (lambda x, y: (x * torch.nan, y), "not finite"),
        (lambda x, y: (x, ["one"] * len(y)), "1 classes"),
        (lambda x, y: (x, ["rare", *y[1:]]), "the smallest of 1 images"),
        (lambda x, y: (x[:0], []), "features .* labels"),
    ],
)
def test_what_cannot_be_probed(change, says: str) -> None:
    x, y = clouds(10, 0.1, 0)
    with pytest.raises(ValueError, match=says):
        linear_probe(*change(x, y), x, y)


def test_a_class_only_the_test_part_has() -> None:
    x, y = clouds(10, 0.1, 0)
    with pytest.raises(ValueError, match=r"only the test part has \['new'\]"):
        linear_probe(x, y, x, ["new", *y[1:]])


def test_halves_part_names_not_images() -> None:
    names = [f"name {i}" for i in range(1000)]
    first = halves([*names, *names])
    assert np.array_equal(first[:1000], first[1000:]) and 430 < first[:1000].sum() < 570
    assert np.array_equal(halves(names[::-1])[::-1], first[:1000]), "order does not matter"
    assert np.array_equal(halves([name.upper() + " " for name in names]), first[:1000])
