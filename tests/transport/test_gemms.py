"""One batched product or a product each: the same scores, the same gradients, against loops over sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip.transport import FeatureSets, pair_costs
from otcclip.transport.backends.gemms import Each, Gemms, Together
from otcclip.transport.backends.simd import LANES

P, D = 5, 8
LENGTHS = np.array([4, 7, 6])
X_BEGINS = np.array([10, 0, 5])
Y_ROWS = np.array([3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7, 8, 9])  # vectors that serve several sets among them


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(15, D, generator=generator), torch.randn(10, D, generator=generator)


def both() -> tuple[Gemms, Together]:
    ends = np.cumsum(LENGTHS)
    spans = zip(X_BEGINS.tolist(), (ends - LENGTHS).tolist(), ends.tolist(), strict=True)
    each = Each([(slice(x, x + P), slice(low, high)) for x, low, high in spans], torch.from_numpy(Y_ROWS))
    together = Together.of(X_BEGINS, P, Y_ROWS, LENGTHS)
    assert together is not None
    return each, together


def blocks(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each set's vectors, and those of y that it meets."""
    rows = torch.from_numpy(Y_ROWS).split(LENGTHS.tolist())
    return [(x[begin : begin + P], y[mine]) for begin, mine in zip(X_BEGINS, rows, strict=True)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scores(vectors: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> None:
    x, y = vectors
    each, together = both()
    expected = [b.to(dtype or b.dtype) @ a.to(dtype or a.dtype).T for a, b in blocks(x, y)]
    s = each.scores(x, y, dtype)
    assert len(s) == sum(map(torch.numel, expected)) + LANES and not s[-LANES:].any()
    torch.testing.assert_close(s[:-LANES], torch.cat([part.float().flatten() for part in expected]))
    s = together.scores(x, y, dtype)
    assert len(s) == len(LENGTHS) * LENGTHS.max() * P + LANES and not s[-LANES:].any()
    for part, padded in zip(expected, s[:-LANES].view(len(LENGTHS), -1, P), strict=True):
        torch.testing.assert_close(padded[: len(part)], part.float())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
def test_gradients(vectors: tuple[Tensor, Tensor], need: tuple[bool, bool], dtype: torch.dtype | None) -> None:
    """What is pulled at a padded place is not the set's, and goes nowhere."""
    x, y = vectors
    for how in both():
        s = how.scores(x, y, None)
        wanted_x, wanted_y = torch.zeros_like(x), torch.zeros_like(y)
        rows = torch.from_numpy(Y_ROWS).split(LENGTHS.tolist())
        for begin, mine in zip(X_BEGINS, rows, strict=True):
            pulled = y[mine] @ x[begin : begin + P].T  # as if the plan were the scores
            wanted_x[begin : begin + P] += pulled.T @ y[mine]
            wanted_y.index_add_(0, mine, pulled @ x[begin : begin + P])
        grads = tuple(torch.zeros_like(v) if wanted else None for v, wanted in zip((x, y), need, strict=True))
        how.pull(s, x, y, (grads[0], grads[1]), dtype)
        tolerance = {} if dtype is None else {"atol": 0.5, "rtol": 0.02}
        for got, wanted in zip(grads, (wanted_x, wanted_y), strict=True):
            if got is not None:
                torch.testing.assert_close(got, wanted, **tolerance)


def test_mostly_padding_is_not_put_together() -> None:
    lengths = np.array([1, 1, 1, 20])
    assert Together.of(np.arange(4) * P, P, np.zeros(23, np.int64), lengths) is None


@pytest.mark.parametrize("sizes", [[6, 6, 6], [6, 4, 6]])
def test_pairs_that_share_sets(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """Sets of one size are put together, others are not; the costs and gradients are torch's either way."""
    generator = torch.Generator().manual_seed(1)

    def sets(of: list[int]) -> FeatureSets:
        values = torch.randn(sum(of), D, generator=generator)
        offsets = torch.tensor([0, *np.cumsum(of)])
        return FeatureSets(torch.nn.functional.normalize(values, dim=1).requires_grad_(), offsets)

    used: list[type] = []
    for kind in (Each, Together):

        def noted(
            self: Gemms, *operands: object, kind: type = kind, scores: Callable[..., Tensor] = kind.scores
        ) -> Tensor:
            used.append(kind)
            return scores(self, *operands)

        monkeypatch.setattr(kind, "scores", noted)
    x, y = sets(sizes), sets([3, 5, 4, 2])
    pairs = torch.tensor([2, 0, 0, 1, 2, 1]), torch.tensor([3, 1, 0, 2, 1, 3])
    answers = []
    for backend in ("torch", "numba"):
        costs = pair_costs(x, y, pairs=pairs, backend=backend)  # type: ignore[arg-type]
        weight = torch.arange(1.0, 7.0)
        answers.append((costs.value, *torch.autograd.grad((costs.value * weight).sum(), (x.values, y.values))))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert set(used) == ({Together} if len(set(sizes)) == 1 else {Each})
