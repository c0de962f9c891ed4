"""Marginals of the caller's and partial transport: against POT in float64, and where the answer is known."""

import numpy as np
import ot
import pytest
import torch
from torch.autograd import gradcheck

from otcclip.transport import FeatureSets, all_costs, nearest, pair_costs, plan

P_SIZES, T_SIZES = [1, 4, 9, 17], [5, 1, 3, 8]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "numba"])


def weighted(sets, seed, zeros=False):
    """Random shares, some of them nothing if `zeros`."""
    values = torch.rand(len(sets.values), generator=torch.Generator().manual_seed(seed)) + 0.05
    if zeros:
        values[1:-1:3] = 0
    parts = [v / v.sum() if v.sum() > 0 else torch.full_like(v, 1 / len(v)) for v in values.split(sets.sizes.tolist())]
    return sets.weighted(torch.cat(parts))


def parts(sets, i):
    """Vectors and weights of a set in float64."""
    cut = slice(int(sets.offsets[i]), int(sets.offsets[i + 1]))
    return sets[i].double(), sets.shares()[cut].double()


@BACKENDS
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
def test_weights_are_the_marginals_of_pot(ragged, backend, epsilon, zeros):
    x, y = weighted(ragged(P_SIZES, seed=1), 1, zeros), weighted(ragged(T_SIZES, seed=2), 2, zeros)
    every = all_costs(x, y, epsilon=epsilon, iterations=3000, tolerance=1e-5, backend=backend).value
    sharp = all_costs(x, y, epsilon=epsilon, iterations=3000, tolerance=1e-5, ranking="sharp", backend=backend).value
    for i in range(4):
        for j in range(4):
            (v, a), (t, b) = parts(x, i), parts(y, j)
            v, a, t, b = v[a > 0], a[a > 0], t[b > 0], b[b > 0]
            cost = (1 - v @ t.T).numpy()
            a, b = (w.numpy() / w.numpy().sum() for w in (a, b))
            p = np.maximum(ot.sinkhorn(a, b, cost, epsilon, "sinkhorn_log", numItermax=3000, stopThr=1e-7), 1e-300)
            value = (p * cost).sum() + epsilon * (p * np.log(p / np.outer(a, b))).sum()
            assert abs(float(every[i, j]) - value) < 1e-4
            assert abs(float(sharp[i, j]) - (p * cost).sum()) < 1e-4


@BACKENDS
def test_a_vector_of_weight_n_is_n_vectors(ragged, backend):
    x, y = ragged([3], seed=3), ragged([4], seed=4)
    twice = FeatureSets.from_list([x[0][[0, 0, 1, 2]]])
    heavy = x.weighted(torch.tensor([0.5, 0.25, 0.25]))
    for ranking in ("entropic", "sharp"):
        costs = [pair_costs(s, y, epsilon=0.05, ranking=ranking, backend=backend).value for s in (twice, heavy)]
        assert torch.allclose(*costs, atol=1e-6)


def test_weights_follow_their_vectors(ragged):
    x, y = weighted(ragged(P_SIZES, seed=5), 5), weighted(ragged(T_SIZES, seed=6), 6)
    every = all_costs(x, y).value
    assert torch.allclose(all_costs(x.take([2, 0]), y).value, every[[2, 0]], atol=1e-6)
    joined = FeatureSets.concatenate([x, ragged([2], seed=7)])
    assert torch.allclose(all_costs(joined, y).value[:4], every, atol=1e-6)
    assert torch.allclose(nearest(x, y).value[:, 0], every.min(1).values, atol=2e-6)
    assert torch.allclose(plan(x, y)[2].sum(0), parts(y, 2)[1].float(), atol=1e-6)


def test_weights_take_part_in_the_gradient(ragged):
    x, y = weighted(ragged([3, 4], 4, seed=8), 8), weighted(ragged([5, 2], 4, seed=9), 9)
    values = [s.values.double().requires_grad_() for s in (x, y)]
    for unmatched in (0.0, 0.4):

        def value(v, t, unmatched=unmatched):
            sets = FeatureSets(v, x.offsets, x.weights), FeatureSets(t, y.offsets, y.weights)
            return all_costs(*sets, epsilon=0.3, iterations=100, unmatched=unmatched).value

        assert gradcheck(value, values, atol=1e-5)


def test_bad_weights_are_refused(ragged):
    x = ragged([2, 3])
    with pytest.raises(ValueError, match=r"weights: expected \[5\] floating point, got \[4\] float32"):
        x.weighted(torch.ones(4))
    with pytest.raises(ValueError, match="x: expected weights that sum to 1, those of set 1 sum to 3"):
        pair_costs(x.weighted(torch.tensor([0.5, 0.5, 1, 1, 1])), x)
    with pytest.raises(ValueError, match="y: expected weights >= 0, got nan for vector 3"):
        pair_costs(x, x.weighted(torch.tensor([0.5, 0.5, 1, torch.nan, 0])))


@BACKENDS
@pytest.mark.parametrize("unmatched", [0.2, 0.7])
def test_partial_transport_is_that_of_pot(ragged, backend, unmatched):
    x, y = weighted(ragged(P_SIZES, seed=10), 10), ragged(T_SIZES, seed=11)
    how = {"epsilon": 0.05, "iterations": 2000, "tolerance": 1e-6, "unmatched": unmatched}
    found = pair_costs(x, y, backend=backend, **how)
    sharp = pair_costs(x, y, ranking="sharp", backend=backend, **how).value
    mass = 1 - unmatched
    for i in range(4):
        (v, a), (t, b) = parts(x, i), parts(y, i)
        cost, a, b = (1 - v @ t.T).numpy(), a.numpy(), b.numpy()
        # POT's entropy is of P, ours relative to abᵀ: the difference is linear in P, a part of the cost.
        shifted = cost - 0.05 * np.log(np.outer(a, b))
        p = ot.partial.entropic_partial_wasserstein(a, b, shifted, 0.05, m=mass, numItermax=20000, stopThr=1e-12)
        kl = (p * np.log(np.maximum(p, 1e-300) / np.outer(a, b) / mass)).sum()
        assert abs(float(sharp[i]) - (p * cost).sum()) < 1e-4
        assert abs(float(found.value[i]) - ((p * cost).sum() + 0.05 * kl)) < 1e-4


def test_partial_transport_near_zero_epsilon_is_the_linear_program(ragged):
    x, y = ragged([6, 9], seed=12), ragged([5, 4], seed=13)
    found = pair_costs(x, y, epsilon=0.005, iterations=3000, unmatched=0.5, ranking="sharp").value
    for i in range(2):
        cost = (1 - x[i].double() @ y[i].double().T).numpy()
        a, b = np.full(len(x[i]), 1 / len(x[i])), np.full(len(y[i]), 1 / len(y[i]))
        assert abs(float(found[i]) - (ot.partial.partial_wasserstein(a, b, cost, m=0.5) * cost).sum()) < 5e-3


@BACKENDS
def test_one_vector_pays_for_what_is_moved(ragged, backend):
    """One against one: a share m of the mass moves at the pair's cost; nothing unmatched is the balanced problem."""
    x, y = ragged([1, 1], seed=14), ragged([1, 1], seed=15)
    cost = (1 - (x.values * y.values).sum(1)).float()
    for unmatched in (0.0, 0.25, 0.9):
        found = pair_costs(x, y, unmatched=unmatched, backend=backend)
        assert torch.allclose(found.value, (1 - unmatched) * cost, atol=1e-6)


def test_what_matches_nothing_is_left_behind():
    """Half of x agrees with y and half opposes it: leaving half unmatched leaves the opposed half."""
    e = torch.eye(4)
    x, y = FeatureSets.from_list([torch.stack([e[0], -e[0]])]), FeatureSets.from_list([e[:1]])
    matrix = plan(x, y, epsilon=0.02, iterations=200, unmatched=0.5)[0]
    assert torch.allclose(matrix, torch.tensor([[0.5], [0.0]]), atol=1e-4)
    assert pair_costs(x, y, epsilon=0.02, iterations=200, unmatched=0.5).value < 0.02
    values = x.values.clone().requires_grad_()
    with pytest.raises(ValueError, match="unmatched: expected 0 with ranking='sharp' and a gradient"):
        pair_costs(FeatureSets(values, x.offsets), y, unmatched=0.5, ranking="sharp")
