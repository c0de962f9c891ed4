"""Values against POT, a plain float64 Sinkhorn and closed forms; options and bad input."""

import numpy as np
import pytest
import torch

from otcclip.errors import UserError
from otcclip.transport import FeatureSets, all_costs, pair_costs, plan, sinkhorn, tiles
from otcclip.transport.backends import Problem, Settings, choice
from otcclip.transport.backends import numba as numba_backend

BACKENDS = pytest.mark.parametrize("backend", ["torch", "numba"])
EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
P_SIZES, T_SIZES = [1, 4, 9, 2, 7, 3], [5, 1, 3, 8, 2, 6]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_converged_value_is_that_of_pot(ragged, oracle, epsilon):
    x, y = ragged(P_SIZES, seed=1), ragged(T_SIZES, seed=2)
    want = [oracle(x[i], y[i], epsilon) for i in range(len(x))]
    for backend in ("torch", "numba"):
        found = pair_costs(x, y, epsilon=epsilon, iterations=5000, tolerance=1e-4, backend=backend)
        assert np.abs(found.value.numpy() - want).max() <= 1e-4


@BACKENDS
@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_float32_is_at_the_iterate_of_float64(ragged, reference, epsilon, iterations, backend):
    x, y = ragged([5, 36, 1, 20], 32, seed=3), ragged([7, 12, 3, 1], 32, seed=4)
    want = torch.tensor([[reference(v, t, epsilon, iterations)[0] for t in map(y.__getitem__, range(4))]
                         for v in map(x.__getitem__, range(4))])  # fmt: skip
    every = all_costs(x, y, epsilon=epsilon, iterations=iterations, backend=backend).value
    paired = pair_costs(x, y, epsilon=epsilon, iterations=iterations, backend=backend).value
    assert ((every - want).abs() / want).max() <= 1e-6
    assert ((paired - want.diag()).abs() / want.diag()).max() <= 1e-6
    double = all_costs(x.to(torch.float64), y, epsilon=epsilon, iterations=iterations).value
    assert double.dtype == torch.float64 and (double - want).abs().max() <= 1e-7  # y's values are float32's


@pytest.mark.parametrize("form", ["scaling", "reduced", "log"])
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_the_forms_agree(ragged, monkeypatch, form, tolerance):
    x, y = ragged(P_SIZES, seed=5), ragged(T_SIZES, seed=6)
    how = {"epsilon": 0.05, "iterations": 40, "tolerance": tolerance, "backend": "torch"}
    want = all_costs(x, y, **how)
    if form == "reduced":
        monkeypatch.setattr(sinkhorn, "_MAX_COST", 1e9)
    elif form == "log":
        monkeypatch.setattr(sinkhorn, "_MAX_COST", 1e9)
        monkeypatch.setitem(sinkhorn._MAX_EXPONENT, torch.float32, -1.0)
    found = all_costs(x, y, **how)
    assert torch.allclose(found.value, want.value, atol=1e-6)
    assert torch.equal(found.iterations, want.iterations)
    assert torch.allclose(found.marginal_error, want.marginal_error, atol=1e-5)


def test_a_batch_may_mix_forms(ragged, reference, monkeypatch):
    """ε = .02 with three opposed directions: some pairs pass max C/ε = 80 even reduced, others do not."""
    e = torch.eye(6)
    hard, easy = torch.stack([e[0], e[1], -e[0]]), torch.stack([e[2], e[3]])
    x = FeatureSets.from_list([hard, easy, hard])
    y = FeatureSets.from_list([torch.stack([e[0], -e[0]]), easy, torch.stack([e[1], -e[1], e[0]])])
    used = []
    for form in (sinkhorn._Scaling, sinkhorn._Log):
        start = form.__init__
        monkeypatch.setattr(form, "__init__", lambda s, *a, start=start: (used.append(type(s)), start(s, *a))[1])
    found = pair_costs(x, y, epsilon=0.02, iterations=50, backend="torch")
    assert used.count(sinkhorn._Log) and used.count(sinkhorn._Scaling)
    want = [reference(x[i], y[i], 0.02, 50)[0] for i in range(3)]
    assert np.abs(found.value.numpy() - want).max() < 1e-6


@pytest.mark.parametrize("epsilon", [0.005, 0.1])
def test_a_single_vector_pays_the_mean_cost(ragged, epsilon):
    """One token (or one patch) leaves one plan, abᵀ: OT_ε is the mean cost, whatever ε."""
    many, one = ragged([1, 5, 9], seed=7), ragged([1, 1, 1], seed=8)
    want = torch.stack([(1 - many[i] @ one[i].T).mean() for i in range(3)])
    assert torch.allclose(pair_costs(many, one, epsilon=epsilon, iterations=1).value, want, atol=2e-7)
    assert torch.allclose(pair_costs(one, many, epsilon=epsilon, iterations=1).value, want, atol=2e-7)


@BACKENDS
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("case", ["equal", "one_hot", "opposed", "same", "lopsided"])
def test_extreme_costs_are_finite_and_right(oracle, epsilon, case, backend):
    e = torch.eye(8)
    v, t = {
        "equal": (e[:1].expand(6, -1), e[1:2].expand(4, -1)),
        "one_hot": (e[:6], e[[0, 1, 2, 3]]),
        "opposed": (e[:1].expand(6, -1), -e[:1].expand(4, -1)),
        "same": (e[:5], e[:5]),
        "lopsided": (torch.cat([e[:1].expand(5, -1), -e[:1]]), torch.cat([e[:1], -e[:1].expand(3, -1)])),
    }[case]
    x, y = FeatureSets.from_list([v, t]), FeatureSets.from_list([t, v])
    found = pair_costs(x, y, epsilon=epsilon, iterations=400, backend=backend)
    assert found.value.isfinite().all() and found.marginal_error.isfinite().all()
    assert np.abs(found.value.numpy() - oracle(v, t, epsilon)).max() <= 1e-4


@BACKENDS
@pytest.mark.parametrize("iterations", [5, 25, 50, 100])
def test_mass_that_has_far_to_go_is_not_lent_on_the_way(reference, iterations, backend):
    """Opposed vectors at ε = .005: C/ε = 400, and the factors grow by e^2.3 an iteration until mass can cross."""
    sides = [torch.tensor([[-1.0]] * k + [[1.0]] * (16 - k)) for k in (13, 2)]
    found = pair_costs(
        *(FeatureSets.from_list([s]) for s in sides), epsilon=0.005, iterations=iterations, backend=backend
    )
    value, matrix = reference(*sides, 0.005, iterations)
    assert found.value.item() == pytest.approx(value, abs=2e-6)
    assert found.marginal_error.item() == pytest.approx(np.abs(matrix.sum(1) - 1 / 16).sum(), abs=1e-4)


@BACKENDS
def test_tolerance_stops_each_pair_on_its_own(ragged, backend):
    x, y = ragged(P_SIZES * 3, seed=9), ragged(T_SIZES * 3, seed=10)
    how = {"epsilon": 0.02, "iterations": 25, "tolerance": 1e-4, "backend": backend}
    found = pair_costs(x, y, **how)
    assert found.iterations.min() < found.iterations.max()
    assert torch.equal(found.converged, found.marginal_error <= 1e-4)
    assert (found.iterations[~found.converged] == 25).all() and found.converged.any()
    alone = [pair_costs(x.take([i]), y.take([i]), **how) for i in range(18)]
    assert torch.equal(found.iterations, torch.cat([one.iterations for one in alone]))
    assert torch.allclose(found.value, torch.cat([one.value for one in alone]), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_acceleration_shortens_the_slow_tail(unit, oracle, epsilon):
    """Matched sets: the same value, converged, in fewer iterations than plain Sinkhorn needs to get there."""
    v = unit(20, 8, seed=1)
    pairs = [(v, torch.nn.functional.normalize(v[:12] + 0.3 * unit(12, 8, seed=s), dim=1)) for s in range(3)]
    x, y = (FeatureSets.from_list([pair[i] for pair in pairs]) for i in (0, 1))
    how = {"epsilon": epsilon, "iterations": 2000, "tolerance": 1e-3}
    fast, plain = (pair_costs(x, y, backend=backend, **how) for backend in ("numba", "torch"))
    assert fast.converged.all() and plain.converged.all()
    assert fast.iterations.sum() < 0.4 * plain.iterations.sum()
    assert np.abs(fast.value.numpy() - [oracle(*pair, epsilon) for pair in pairs]).max() < 2e-4


def test_without_tolerance_every_iteration_is_done(ragged):
    found = all_costs(ragged([3, 4], seed=1), ragged([2, 5, 1], seed=2), epsilon=0.5, iterations=7)
    assert found.iterations.tolist() == [[7] * 3] * 2 and found.converged.all()


def test_plan_is_the_reference_plan(ragged, reference):
    x, y = ragged(P_SIZES, seed=11), ragged(T_SIZES, seed=12)
    for i, matrix in enumerate(plan(x, y, epsilon=0.05, iterations=9)):
        assert matrix.shape == (P_SIZES[i], T_SIZES[i])
        assert np.abs(matrix.numpy() - reference(x[i], y[i], 0.05, 9)[1]).max() < 1e-6


def test_sharp_is_the_cost_of_the_plan(ragged):
    x, y = ragged(P_SIZES, seed=13), ragged(T_SIZES, seed=14)
    plans = plan(x, y, epsilon=0.05, iterations=30)
    want = torch.stack([(m * (1 - x[i] @ y[i].T)).sum() for i, m in enumerate(plans)])
    assert torch.allclose(pair_costs(x, y, epsilon=0.05, iterations=30, ranking="sharp").value, want, atol=1e-6)
    every = all_costs(x, y, epsilon=0.05, iterations=30, ranking="sharp").value
    assert torch.allclose(every.diag(), want, atol=1e-6)


@BACKENDS
def test_small_tiles_change_nothing(ragged, monkeypatch, backend):
    """Many tiles, strips and paddings give what one tile gives, gradient included."""

    def run() -> list[torch.Tensor]:
        x, y = ragged(P_SIZES * 3, seed=15), ragged(T_SIZES * 3, seed=16)
        x.values.requires_grad_(), y.values.requires_grad_()
        every, paired = (door(x, y, backend=backend).value for door in (all_costs, pair_costs))
        (every.square().sum() + paired.square().sum()).backward()
        return [every.detach(), paired.detach(), x.values.grad, y.values.grad]

    want = run()
    for room in (tiles, numba_backend):
        monkeypatch.setattr(room, "TILE_SCORES", 200)
        monkeypatch.setattr(room, "STRIP_SETS", 3)
    monkeypatch.setattr(numba_backend, "GATHERED", 10)
    for found, expected in zip(run(), want, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_bfloat16_gemm_is_close_and_autocast_does_not_sneak_in(ragged):
    x, y = ragged([16] * 4, 64, seed=17), ragged([9] * 4, 64, seed=18)
    exact = all_costs(x, y).value
    rounded = all_costs(x, y, gemm_dtype=torch.bfloat16).value
    assert 0 < (rounded - exact).abs().max() < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(all_costs(x, y).value, exact)
    low = x.to(torch.bfloat16)
    assert all_costs(low, y).value.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon: .* > 0, got 0.0"),
        ({"epsilon": float("nan")}, "epsilon: .*nan"),
        ({"iterations": 0}, "iterations: .*got 0"),
        ({"iterations": 2.5}, "iterations: .*got 2.5"),
        ({"tolerance": -1.0}, "tolerance: .*got -1.0"),
        ({"ranking": "blunt"}, "ranking: .*got 'blunt'"),
        ({"backend": "cuda"}, "backend: expected one of auto, torch, numba, triton, got 'cuda'"),
        ({"backend": "triton"}, "backend: 'triton' runs on cuda, got vectors on cpu; use 'torch'"),
        ({"unmatched": 1.0}, "unmatched: .*got 1.0"),
        ({"unmatched": -0.1}, "unmatched: .*got -0.1"),
    ],
)
@pytest.mark.parametrize("door", [pair_costs, all_costs])
def test_bad_options_are_refused(ragged, door, change, message):
    x = ragged([2, 3])
    with pytest.raises(ValueError, match=message):
        door(x, x, **change)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_a_missing_package_is_named_with_its_pip_line(ragged, backend, monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"backend: '{backend}' needs .*: pip install {backend}"):
        pair_costs(ragged([2]), ragged([2]), backend=backend)
    assert choice.choose("auto", torch.device("cpu"), torch.float32).__name__.endswith("backends.torch")


def test_auto_takes_numba_for_float32_on_a_cpu():
    names = [choice.choose("auto", torch.device("cpu"), d).__name__ for d in (torch.float32, torch.float64)]
    assert [name.rpartition(".")[2] for name in names] == ["numba", "torch"]
    with pytest.raises(ValueError, match=r"backend: 'numba' solves in float32, got torch\.float64"):
        choice.choose("numba", torch.device("cpu"), torch.float64)


def test_many_tiny_pairs_are_left_to_torch_and_agree(ragged):
    """One-to-one, a GEMM a pair would cost more than it does; listed, they share their x and do not."""
    x, y = ragged([4] * 300, seed=21), ragged([3] * 300, seed=22)
    one_to_one = torch.arange(300), torch.arange(300)
    shared = torch.arange(300) // 30, torch.arange(300)
    how = Settings(0.1, 20)
    for pairs, left in ((one_to_one, True), (shared, False)):
        problem = Problem(x, y, x.shares(), y.shares(), pairs)
        assert numba_backend._only_portable(problem, how, True) is left
        costs = [pair_costs(x, y, pairs=pairs, backend=backend).value for backend in ("numba", "torch")]
        assert torch.allclose(*costs, atol=1e-6)


def test_pairs_are_those_that_take_would_make(ragged):
    x, y = ragged(P_SIZES, seed=19), ragged(T_SIZES, seed=20)
    i, j = [5, 0, 0, 3, 5, 0], [1, 1, 4, 2, 0, 1]
    for backend in ("torch", "numba"):
        listed = pair_costs(x, y, pairs=(torch.tensor(i), torch.tensor(j)), backend=backend)
        assert torch.allclose(listed.value, pair_costs(x.take(i), y.take(j), backend=backend).value, atol=1e-6)
    with pytest.raises(ValueError, match=r"pairs: expected indices of y in \[0, 6\), got 0 to 6"):
        pair_costs(x, y, pairs=(torch.tensor([0, 1]), torch.tensor([0, 6])))
    with pytest.raises(ValueError, match=r"pairs: expected two \[n\] tensors of indices, got \[\[1\], \[2\]\]"):
        pair_costs(x, y, pairs=(torch.tensor([0]), torch.tensor([0, 1])))


def test_bad_operands_are_refused(ragged):
    x = ragged([2, 3])
    for door in (pair_costs, plan):
        with pytest.raises(ValueError, match="y: expected 2 sets as in x, got 1"):
            door(x, ragged([2]))
    with pytest.raises(ValueError, match="y: expected vectors of dim 6 as in x, got 7"):
        all_costs(x, ragged([2], 7))
    with pytest.raises(ValueError, match="y: expected device cpu as in x, got meta"):
        all_costs(x, x.to("meta"))
    long = FeatureSets(x.values * 2, x.offsets)
    with pytest.raises(ValueError, match="y: expected unit vectors"):
        all_costs(x, long)
    with pytest.raises(ValueError, match="x: expected unit vectors"):
        pair_costs(long, x)
    assert all_costs(x, long, validate=False).value.shape == (2, 2)
