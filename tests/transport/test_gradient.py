"""Both gradients against finite differences, and the envelope one against unrolled autograd."""

import pytest
import torch
from torch.autograd import gradcheck

from otcclip.transport import FeatureSets, all_costs, pair_costs

P_OFFSETS, T_OFFSETS = torch.tensor([0, 3, 4, 8]), torch.tensor([0, 2, 5, 6])


@pytest.fixture
def both(unit):
    x, y = unit(8, 4, seed=1, dtype=torch.float64), unit(6, 4, seed=2, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("door", [pair_costs, all_costs])
@pytest.mark.parametrize("ranking", ["entropic", "sharp"])
def test_gradcheck(both, door, ranking):
    """Envelope and implicit gradients hold at convergence."""

    def value(x, y):
        sets = FeatureSets(x, P_OFFSETS), FeatureSets(y, T_OFFSETS)
        return door(*sets, epsilon=0.3, iterations=100, ranking=ranking).value

    assert gradcheck(value, both, atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("door", [pair_costs, all_costs])
def test_envelope_gradient_is_the_unrolled_one(unit, both, door, epsilon):
    x, y = both
    found = door(FeatureSets(x, P_OFFSETS), FeatureSets(y, T_OFFSETS), epsilon=epsilon, iterations=200).value
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((found * weight).sum(), (x, y))

    total = x.new_zeros(())
    for i in range(3):
        for j in [i] if door is pair_costs else range(3):
            v, t = x[P_OFFSETS[i] : P_OFFSETS[i + 1]], y[T_OFFSETS[j] : T_OFFSETS[j + 1]]
            scaled = (v @ t.T - 1) / epsilon
            log_a, log_b = -torch.tensor(len(v)).log(), -torch.tensor(len(t)).log()
            g = x.new_zeros(len(t))
            for _ in range(200):
                f = -torch.logsumexp(scaled + g + log_b, 1)
                g = -torch.logsumexp(scaled + f[:, None] + log_a, 0)
            total = total + weight[(i,) if door is pair_costs else (i, j)] * epsilon * (f.mean() + g.mean())
    for mine, theirs in zip(got, torch.autograd.grad(total, (x, y)), strict=True):
        assert (mine - theirs).abs().max() < 1e-6


def test_sharp_gradient_is_not_the_plan(both):
    sets = [FeatureSets(v, o) for v, o in zip(both, (P_OFFSETS, T_OFFSETS), strict=True)]
    kinds = ("sharp", "entropic")
    sharp, envelope = (
        torch.autograd.grad(pair_costs(*sets, iterations=200, ranking=kind).value.sum(), both[0])[0] for kind in kinds
    )
    assert (sharp - envelope).norm() > 0.02 * envelope.norm()


def test_sharp_gradient_in_float32_is_that_of_float64(both):
    """Through the numba backend's door, whose sharp gradients are torch's."""
    grads = []
    for dtype in (torch.float64, torch.float32):
        values = [v.detach().to(dtype).requires_grad_() for v in both]
        sets = FeatureSets(values[0], P_OFFSETS), FeatureSets(values[1], T_OFFSETS)
        cost = all_costs(*sets, epsilon=0.1, iterations=400, tolerance=1e-6, ranking="sharp").value
        grads.append(torch.autograd.grad(cost.sum(), values))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 1e-3


def test_sharp_value_is_the_same_with_and_without_a_gradient(both):
    sets = [FeatureSets(v, o) for v, o in zip(both, (P_OFFSETS, T_OFFSETS), strict=True)]
    with_grad = all_costs(*sets, iterations=6, ranking="sharp")
    without = all_costs(*(s.detach() for s in sets), iterations=6, ranking="sharp")
    assert torch.allclose(with_grad.value, without.value, atol=1e-12)
    assert torch.allclose(with_grad.marginal_error, without.marginal_error, atol=1e-9)
    assert torch.equal(with_grad.iterations, without.iterations)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("door", [pair_costs, all_costs])
def test_one_side_alone_gets_its_gradient(both, door, side):
    def grad(needed):
        values = [v.detach().requires_grad_(i in needed) for i, v in enumerate(both)]
        door(FeatureSets(values[0], P_OFFSETS), FeatureSets(values[1], T_OFFSETS)).value.sum().backward()
        return [v.grad for v in values]

    alone, together = grad({side}), grad({0, 1})
    assert alone[1 - side] is None and torch.allclose(alone[side], together[side])


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("epsilon", [0.01, 0.1])
def test_float32_gradient_is_that_of_float64(ragged, backend, epsilon):
    """Over several tiles, ragged both ways, with a weight for every pair."""
    x, y = ragged([5, 17, 1, 36, 20], 16, seed=1), ragged([7, 33, 1, 12], 16, seed=2)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.tensor([0, 3, 3, 1, 4, 0]), torch.tensor([1, 0, 3, 2, 2, 1])
    grads = []
    for dtype, solver in ((torch.float64, "torch"), (torch.float32, backend)):
        values = [v.values.to(dtype).requires_grad_() for v in (x, y)]
        sets = FeatureSets(values[0], x.offsets), FeatureSets(values[1], y.offsets)
        every = all_costs(*sets, epsilon=epsilon, backend=solver).value
        listed = pair_costs(*sets, pairs=index, epsilon=epsilon, backend=solver).value
        total = (every * weight.to(dtype)).sum() + (listed * weight.to(dtype)[0, 0] * 3).sum()
        grads.append(torch.autograd.grad(total, values))
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 2e-5 * mine.abs().max()


def test_bfloat16_gemm_gradient_is_close(unit):
    values = [unit(40, 32, seed=s).requires_grad_() for s in (3, 4)]
    sets = [FeatureSets(v, torch.tensor([0, 10, 40])) for v in values]
    for door in (pair_costs, all_costs):
        exact = torch.autograd.grad(door(*sets).value.sum(), values)
        rounded = torch.autograd.grad(door(*sets, gemm_dtype=torch.bfloat16).value.sum(), values)
        for a, b in zip(exact, rounded, strict=True):
            assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.02 * a.norm()


def test_a_set_against_itself_sums_both_gradients(unit):
    values = unit(6, 4, seed=5, dtype=torch.float64).requires_grad_()
    sets = FeatureSets(values, torch.tensor([0, 2, 6]))
    assert gradcheck(lambda v: all_costs(*[FeatureSets(v, sets.offsets)] * 2, iterations=300).value, values)
