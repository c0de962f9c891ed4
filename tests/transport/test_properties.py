"""What holds for every pair of sets: invariances, marginals, symmetry, the rising lower bound."""

from itertools import pairwise

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from otcclip.transport import FeatureSets, all_costs, nearest, pair_costs, plan

# float32 rounding of a value of order 1.
EXACT = 2e-6
fast = settings(max_examples=25, deadline=None)
epsilons = st.sampled_from([0.005, 0.02, 0.05, 0.2])


sizes = st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 49, 64, 77, 200]))


@st.composite
def two_sets(draw, dtype=torch.float32, sizes=sizes, equally_many=True):
    """Batches x, y of ragged sets: all equal, clustered, spread or one-hot, alike or opposed."""
    n, dim = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 0.3, 3.0, 100.0, None]))
    centre = torch.randn(dim, generator=generator, dtype=torch.float64)

    def side():
        parts = []
        most = n if equally_many else 6
        for size in draw(st.lists(sizes, min_size=n, max_size=most)):
            if spread is None:
                values = torch.eye(dim, dtype=torch.float64)[torch.randint(dim, (size,), generator=generator)]
            else:
                values = centre + spread * torch.randn(size, dim, generator=generator, dtype=torch.float64)
            sign = 1 if draw(st.booleans()) else -1
            parts.append(torch.nn.functional.normalize(sign * values, dim=1).to(dtype))
        return FeatureSets.from_list(parts)

    return side(), side()


@fast
@given(two_sets(equally_many=False), epsilons, st.integers(1, 3))
def test_the_nearest_are_those_of_brute_force(sets, epsilon, k):
    x, y = sets
    k = min(k, len(y))
    every = all_costs(x, y, epsilon=epsilon, iterations=15).value
    found = nearest(x, y, k, epsilon=epsilon, iterations=15)
    want = every.topk(k, largest=False).values
    assert found.certified.all()
    assert torch.allclose(found.value, want, atol=EXACT) and torch.allclose(
        every.gather(1, found.index), want, atol=EXACT
    )


@fast
@given(two_sets(), epsilons)
def test_backends_agree(sets, epsilon):
    x, y = sets
    found = [all_costs(x, y, epsilon=epsilon, iterations=15, backend=b) for b in ("numba", "torch")]
    assert torch.allclose(found[0].value, found[1].value, atol=EXACT)
    assert torch.allclose(found[0].marginal_error, found[1].marginal_error, atol=5e-4)


@fast
@given(two_sets(), epsilons, st.randoms(use_true_random=False))
def test_order_inside_a_set_does_not_matter(sets, epsilon, random):
    x, y = sets
    shuffled = FeatureSets.from_list([v[torch.tensor(random.sample(range(len(v)), len(v)))] for v in map(x.__getitem__, range(len(x)))])  # noqa: E501  # fmt: skip
    kwargs = {"epsilon": epsilon, "iterations": 15}
    assert torch.allclose(pair_costs(x, y, **kwargs).value, pair_costs(shuffled, y, **kwargs).value, atol=EXACT)


@fast
@given(two_sets(), epsilons)
def test_neighbours_and_padding_do_not_matter(sets, epsilon):
    """A set padded to the batch's largest costs what it costs alone."""
    x, y = sets
    together = all_costs(x, y, epsilon=epsilon, iterations=15)
    for i in range(len(x)):
        for j in range(len(y)):
            alone = all_costs(x.take([i]), y.take([j]), epsilon=epsilon, iterations=15)
            assert torch.allclose(together.value[i, j], alone.value[0, 0], atol=EXACT)
            assert torch.allclose(together.marginal_error[i, j], alone.marginal_error[0, 0], atol=1e-4)
    paired = pair_costs(x, y, epsilon=epsilon, iterations=15).value
    assert torch.allclose(together.value.diag(), paired, atol=EXACT)


@fast
@given(two_sets(), epsilons)
def test_marginals_of_the_plan(sets, epsilon):
    x, y = sets
    error = pair_costs(x, y, epsilon=epsilon, iterations=25).marginal_error
    for i, matrix in enumerate(plan(x, y, epsilon=epsilon, iterations=25)):
        p, t = matrix.shape
        assert (matrix >= 0).all() and torch.allclose(matrix.sum(0), torch.full((t,), 1 / t), atol=1e-4)
        assert torch.allclose((matrix.sum(1) - 1 / p).abs().sum(), error[i], atol=2e-4)


@fast
@given(two_sets(torch.float64, st.integers(1, 12)), st.sampled_from([0.1, 0.3, 1.0]))
def test_symmetric_at_convergence(sets, epsilon):
    x, y = sets
    kwargs = {"epsilon": epsilon, "iterations": 3000, "tolerance": 1e-7}
    forth, back = all_costs(x, y, **kwargs), all_costs(y, x, **kwargs)
    done = forth.converged & back.converged.T
    assume(done.any())  # a few hard pairs take more iterations than these
    assert torch.allclose(forth.value[done], back.value.T[done], atol=1e-6)


@fast
@given(two_sets(), epsilons)
def test_dual_rises_and_stays_below_the_converged_value(sets, epsilon):
    x, y = sets
    values = [pair_costs(x, y, epsilon=epsilon, iterations=n).value for n in (1, 2, 3, 5, 20)]
    values.append(pair_costs(x.to(torch.float64), y, epsilon=epsilon, iterations=300).value.float())
    for earlier, later in pairwise(values):
        assert (earlier <= later + EXACT).all()


@fast
@given(two_sets(), epsilons)
def test_value_lies_between_bounds_known_without_solving(sets, epsilon):
    """0 ≤ min C ≤ OT_ε ≤ mean C, the last being the cost of abᵀ, whose KL is 0."""
    x, y = sets
    value = pair_costs(x, y, epsilon=epsilon, iterations=50).value
    for i in range(len(x)):
        cost = 1 - x[i] @ y[i].T
        assert value[i] <= cost.mean() + EXACT
        relaxed = pair_costs(x.take([i]), y.take([i]), epsilon=epsilon, iterations=1).value
        assert relaxed >= cost.min() - EXACT
