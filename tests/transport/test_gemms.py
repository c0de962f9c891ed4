"""One batched product or a product each: the same scores, the same gradients, against loops over sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip.transport import FeatureSets, pair_costs
from otcclip.transport.backends import numba
from otcclip.transport.backends.gemms import Each, Gemms, Together
from otcclip.transport.backends.simd import LANES

P, D = 5, 8
LENGTHS = np.array([4, 7, 6])
X_BEGINS = np.array([10, 0, 5])
Y_ROWS = np.array([3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7, 8, 9])  # vectors that serve several sets among them


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(15, D, generator=generator), torch.randn(20, D, generator=generator)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sets of x each batched product of scores was for, as they are made."""
    found: list[int] = []

    def noted(self: Together, *operands: Any, scores: Callable[..., Tensor] = Together.scores) -> Tensor:
        found.append(len(self.x_rows))
        return scores(self, *operands)

    monkeypatch.setattr(Together, "scores", noted)
    return found


def each(first: int) -> tuple[Gemms, Tensor]:
    """Sets of y one after another from `first` on, and their rows."""
    ends = np.cumsum(LENGTHS)
    spans = zip(X_BEGINS.tolist(), (ends - LENGTHS).tolist(), ends.tolist(), strict=True)
    total = int(ends[-1])
    parts = [(slice(x, x + P), slice(low, high)) for x, low, high in spans]
    return Each(parts, slice(first, first + total)), torch.arange(first, first + total)


def together() -> tuple[Gemms, Tensor]:
    return Together.of(X_BEGINS, P, Y_ROWS, LENGTHS), torch.from_numpy(Y_ROWS)


def blocks(x: Tensor, y: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each set's vectors, and those of y that it meets."""
    return [(x[b : b + P], y[mine]) for b, mine in zip(X_BEGINS, rows.split(LENGTHS.tolist()), strict=True)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores(vectors: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> None:
    x, y = vectors

    def expected(rows: Tensor) -> list[Tensor]:
        return [(b.to(dtype or b.dtype) @ a.to(dtype or a.dtype).T).float() for a, b in blocks(x, y, rows)]

    how, rows = each(first=2)
    s = how.scores(x, y, dtype)
    torch.testing.assert_close(s[:-LANES], torch.cat([part.flatten() for part in expected(rows)]))
    assert not s[-LANES:].any()
    how, rows = together()
    s = how.scores(x, y, dtype)
    assert len(s) == len(LENGTHS) * LENGTHS.max() * P + LANES and not s[-LANES:].any()
    for part, padded in zip(expected(rows), s[:-LANES].view(len(LENGTHS), -1, P), strict=True):
        torch.testing.assert_close(padded[: len(part)], part)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", ["each", "together"])
def test_gradients(
    vectors: tuple[Tensor, Tensor], kind: str, need: tuple[bool, bool], dtype: torch.dtype | None
) -> None:
    """What is pulled at a padded place is not the set's, and goes nowhere."""
    x, y = vectors
    how, rows = together() if kind == "together" else each(first=2)
    s = how.scores(x, y, None)
    wanted_x, wanted_y = torch.zeros_like(x), torch.zeros_like(y)
    for begin, mine in zip(X_BEGINS, rows.split(LENGTHS.tolist()), strict=True):
        pulled = y[mine] @ x[begin : begin + P].T  # as if the plan were the scores
        wanted_x[begin : begin + P] += pulled.T @ y[mine]
        wanted_y.index_add_(0, mine, pulled @ x[begin : begin + P])
    grads = tuple(torch.zeros_like(v) if wanted else None for v, wanted in zip((x, y), need, strict=True))
    how.pull(s, x, y, (grads[0], grads[1]), dtype)
    tolerance = {} if dtype is None else {"atol": 0.5, "rtol": 0.02}
    for got, wanted in zip(grads, (wanted_x, wanted_y), strict=True):
        if got is not None:
            torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize(("sizes", "expected_groups"), [([6, 6, 6], [3]), ([6, 4, 6], [1, 2])])
def test_pairs_that_share_sets(made: list[int], sizes: list[int], expected_groups: list[int]) -> None:
    """Sets of one size that meet about as much are put together; the costs and gradients are torch's."""
    generator = torch.Generator().manual_seed(1)

    def sets(of: list[int]) -> FeatureSets:
        values = torch.randn(sum(of), D, generator=generator)
        offsets = torch.tensor([0, *np.cumsum(of)])
        return FeatureSets(torch.nn.functional.normalize(values, dim=1).requires_grad_(), offsets)

    x, y = sets(sizes), sets([3, 5, 4, 2])
    pairs = torch.tensor([2, 0, 0, 1, 2, 1]), torch.tensor([3, 1, 0, 2, 1, 3])
    answers = []
    for backend in ("torch", "numba"):
        costs = pair_costs(x, y, pairs=pairs, backend=backend)  # type: ignore[arg-type]
        weight = torch.arange(1.0, 7.0)
        answers.append((costs.value, *torch.autograd.grad((costs.value * weight).sum(), (x.values, y.values))))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert made == expected_groups, "made once: so few are kept for the gradient"


@pytest.mark.parametrize("kept", [True, False])
def test_a_gradient_asked_for_twice_is_the_same_twice(
    monkeypatch: pytest.MonkeyPatch, made: list[int], kept: bool
) -> None:
    """Scores that were kept are used up by the first; where there are too many they are made anew each time."""
    monkeypatch.setattr(numba, "KEPT_SCORES", (1 << 21) * kept)
    generator = torch.Generator().manual_seed(2)
    x, y = (
        FeatureSets.from_dense(
            torch.nn.functional.normalize(torch.randn(3, n, D, generator=generator), dim=2).requires_grad_()
        )
        for n in (6, 4)
    )
    pairs = torch.tensor([2, 0, 0, 1, 2, 1]), torch.tensor([2, 1, 0, 2, 1, 0])
    total = (pair_costs(x, y, pairs=pairs, backend="numba").value * torch.arange(1.0, 7.0)).sum()
    first = torch.autograd.grad(total, (x.values, y.values), retain_graph=True)
    assert len(made) == (1 if kept else 2)
    for again, expected in zip(torch.autograd.grad(total, (x.values, y.values)), first, strict=True):
        assert torch.equal(again, expected)
    assert len(made) == (2 if kept else 3)


def test_scores_are_kept_for_all_tiles_or_for_none(monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    """Room for the scores of the first of two tiles alone: a gradient of those few would be no gradient."""
    generator = torch.Generator().manual_seed(3)

    def sets(of: list[int]) -> FeatureSets:
        values = torch.nn.functional.normalize(torch.randn(sum(of), D, generator=generator), dim=1)
        return FeatureSets(values.requires_grad_(), torch.tensor([0, *np.cumsum(of)]))

    x, y = sets([6, 4, 6]), sets([3, 5, 4, 2])
    pairs = torch.tensor([2, 0, 0, 1, 2, 1]), torch.tensor([3, 1, 0, 2, 1, 3])
    grads = []
    for room in (1 << 21, 4 * 6 + LANES):
        monkeypatch.setattr(numba, "KEPT_SCORES", room)
        made.clear()
        grads.append(torch.autograd.grad(pair_costs(x, y, pairs=pairs, backend="numba").value.sum(), x.values)[0])
    assert made == [1, 2, 1, 2], "the second time none was kept"
    assert torch.equal(*grads)
