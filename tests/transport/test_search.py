"""nearest against brute force over every pair; what it certifies, what it solves, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.transport import FeatureSets, Summary, all_costs, load, nearest, save, search, tiers, tiles
from otcclip.transport.solve import half_step

fast = settings(max_examples=25, deadline=None)


def clustered(n, sizes, seed, spread=0.5, dim=8):
    """Sets around shared centres, so that some pool sets are much nearer than others."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, dim, generator=torch.Generator().manual_seed(99))
    parts = []
    for i in range(n):
        size = sizes[i % len(sizes)]
        about = centres[torch.randint(10, (1,), generator=generator)]
        values = about + spread * torch.randn(size, dim, generator=generator)
        parts.append(torch.nn.functional.normalize(values, dim=1))
    return FeatureSets.from_list(parts)


def unequal(sets, seed):
    """The sets with unequal weights that sum to one."""
    mass = torch.rand(len(sets.values), generator=torch.Generator().manual_seed(seed)) + 0.01
    return sets.weighted(torch.cat([part / part.sum() for part in mass.split(sets.sizes.tolist())]))


def assert_is_brute_force(found, queries, pool, k, **kwargs):
    every = all_costs(queries, pool, **kwargs).value
    want = every.topk(k, largest=False).values
    assert found.index.shape == found.value.shape == (len(queries), k)
    assert torch.allclose(found.value, want, atol=2e-6)
    # The index is judged by what it costs: ties within rounding may fall either way.
    assert torch.allclose(every.gather(1, found.index), want, atol=2e-6)
    assert all(len(set(row)) == k for row in found.index.tolist())


@fast
@given(
    st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 5),
    st.sampled_from([0.005, 0.05, 0.5]), st.sampled_from([0.0, 0.3, 3.0]), st.sampled_from([60, 1 << 17]),
)  # fmt: skip
def test_exact_is_brute_force(n, m, seed, k, epsilon, spread, tile):
    queries = clustered(n, [9, 4], seed, spread)
    pool = clustered(m, [1, 5, 3, 12], seed + 1, spread)
    k = min(k, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_SCORES", tile)
        patch.setattr(tiers, "STRETCH", 16)
        patch.setattr(tiers, "BLOCK", 7)
        patch.setattr(search, "QUERIES", 3)
        found = nearest(queries, pool, k, epsilon=epsilon, iterations=12)
    assert found.certified.all()
    assert_is_brute_force(found, queries, pool, k, epsilon=epsilon, iterations=12)


def test_bounds_prune_and_solved_counts_pairs():
    queries, pool = clustered(12, [9], 1), clustered(400, [3, 6, 10], 2)
    found = nearest(queries, pool, 2)
    assert found.solved.float().mean() < 100 and (found.solved >= 2).all()
    assert_is_brute_force(found, queries, pool, 2)


def test_bad_seeds_cost_work_but_never_the_answer():
    """Pooled vectors that mislead (the screen reads them) leave the exact answer exact."""
    queries, pool = clustered(6, [9], 3), clustered(80, [4, 7], 4)
    noise = torch.randn(86, 5, generator=torch.Generator().manual_seed(0))
    pooled = {"pooled_queries": noise[:6], "pooled_pool": noise[6:]}
    assert_is_brute_force(nearest(queries, pool, 3, **pooled), queries, pool, 3)
    screened = nearest(queries, pool, 3, screen=5, **pooled)
    want = (noise[:6] @ noise[6:].T).topk(5).indices
    assert all(set(f) <= set(w) for f, w in zip(screened.index.tolist(), want.tolist(), strict=True))


def test_screen_ranks_the_top_by_pooled_cosine():
    queries, pool = clustered(5, [9, 2], 5), clustered(60, [4, 7], 6)
    found = nearest(queries, pool, 2, screen=10)
    assert found.solved.tolist() == [10] * 5 and not found.certified.all()
    top = (queries.pooled() @ pool.pooled().T).topk(10).indices
    every = all_costs(queries, pool).value.gather(1, top)
    order = every.topk(2, largest=False)
    assert torch.allclose(found.value, order.values, atol=2e-6)
    assert torch.equal(found.index, top.gather(1, order.indices))
    whole = nearest(queries, pool, 2, screen=1000)
    assert whole.certified.all()
    assert_is_brute_force(whole, queries, pool, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certified_screen_is_brute_force(dtype):
    """A caption of its own for every image: certified if sets are tight, and rightly; no certificate if loose."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(300, 32, generator=generator)

    def about(n, size, spread):
        values = centres[:n, None] + spread * torch.randn(n, size, 32, generator=generator)
        return FeatureSets.from_dense(torch.nn.functional.normalize(values, dim=2))

    for spread, least, most in ((0.3, 25, 30), (3.0, 0, 5)):
        queries, pool = about(30, 9, spread), about(300, 5, spread)
        found = nearest(queries, pool, screen=6, summary=Summary.of(pool, dtype))
        assert least <= found.certified.sum() <= most and found.solved.tolist() == [6] * 30
        every = all_costs(queries, pool).value.min(1, keepdim=True).values
        assert torch.allclose(found.value[found.certified], every[found.certified], atol=2e-6)
        exact = nearest(queries, pool, summary=Summary.of(pool, dtype))
        assert exact.certified.all() and torch.allclose(exact.value, every, atol=2e-6)


@fast
@given(
    st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5, 3.0]), st.sampled_from([0.01, 0.1, 0.5]), st.integers(1, 4)
)
def test_pooled_bound_is_below_every_iterate(seed, spread, epsilon, iterations):
    queries, pool = clustered(6, [9, 1, 4], seed, spread), clustered(9, [1, 5, 30], seed + 1, spread)
    mine, theirs = Summary.of(queries), Summary.of(pool)
    means = (s.direction * s.length[:, None] for s in (mine, theirs))
    bound = 1 - torch.matmul(next(means), next(means).T) - theirs.reach(epsilon)
    assert (bound <= all_costs(queries, pool, epsilon=epsilon, iterations=iterations).value + 2e-6).all()


@fast
@given(
    st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.01, 0.05, 0.5]), st.integers(1, 3),
    st.sampled_from(["torch", "numba"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_half_step_is_the_first_potential_and_below_every_iterate(
    seed, spread, epsilon, iterations, backend, listed, weighted
):
    queries, pool = clustered(7, [9, 1, 33, 16], seed, spread), clustered(60, [1, 5, 30, 16], seed + 1, spread)
    if weighted:
        queries, pool = (unequal(sets, seed) for sets in (queries, pool))
    pairs = (torch.arange(420) // 60, torch.arange(420) % 60) if listed else None
    found = half_step(queries, pool, epsilon=epsilon, backend=backend, pairs=pairs).view(7, 60)
    a, b = queries.shares(torch.float64), pool.shares(torch.float64)
    similarity = queries.values.double() @ pool.values.double().T
    for i, j in ((0, 0), (2, 2), (5, 30), (6, 59)):
        rows = slice(*queries.offsets[i : i + 2].tolist())
        columns = slice(*pool.offsets[j : j + 2].tolist())
        f = -epsilon * torch.logsumexp((similarity[rows, columns] - 1) / epsilon + b[columns].log(), dim=1)
        assert abs(float(a[rows] @ f - found[i, j])) < 2e-6
    assert (found <= all_costs(queries, pool, epsilon=epsilon, iterations=iterations).value + 2e-6).all()
    rough = half_step(queries, pool, epsilon=epsilon, backend=backend, pairs=pairs, gemm_dtype=torch.bfloat16).view(
        7, 60
    )
    assert (rough - found).abs().max() < tiers._HALF_SLACK


def test_half_step_in_float64_and_of_a_pool_in_bfloat16():
    queries, pool = clustered(3, [9], 1), clustered(20, [5], 2)
    exact = half_step(queries.to(torch.float64), pool.to(torch.float64), epsilon=0.1)
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), half_step(queries, pool, epsilon=0.1), atol=2e-6)
    half = half_step(queries, pool.to(torch.bfloat16), epsilon=0.1)
    assert half.dtype == torch.float32 and (half - exact).abs().max() < tiers._HALF_SLACK


def test_half_step_leaves_little_to_iterate(monkeypatch):
    """Where the pooled bound says nothing, few pairs see an iteration at all."""
    iterated = []
    monkeypatch.setattr(tiers, "all_costs", lambda *args, **kwargs: iterated.append(1))
    whole = tiers.pair_costs

    def counted(*args, **kwargs):
        iterated.extend([1] * len(kwargs["pairs"][0]))
        return whole(*args, **kwargs)

    monkeypatch.setattr(tiers, "pair_costs", counted)
    queries, pool = clustered(8, [9], 3, 1.0, 32), clustered(1000, [5], 4, 1.0, 32)
    found = nearest(queries, pool)
    assert found.certified.all() and len(iterated) < 0.1 * 8 * 1000


def test_rounding_to_bfloat16_never_drops_the_nearest(monkeypatch):
    """A pool of near ties, single vectors: half a step is the value itself, and only the slack keeps the best.

    Pooled vectors that say nothing, so that the screen does not find it first.
    """
    monkeypatch.setattr(tiers, "_half_dtype", lambda queries, pool: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    middle = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    near = torch.nn.functional.normalize(middle + 2e-4 * torch.randn(400, 1, 32, generator=generator), dim=2)
    about = middle + 0.1 * torch.randn(20, 3, 32, generator=generator)
    queries = FeatureSets.from_dense(torch.nn.functional.normalize(about, dim=2))
    pool = FeatureSets.from_dense(near)
    noise = torch.randn(420, 5, generator=generator)
    found = nearest(queries, pool, 2, pooled_queries=noise[:20], pooled_pool=noise[20:])
    assert_is_brute_force(found, queries, pool, 2)


def test_a_lost_certificate_is_looked_at_no_more(monkeypatch):
    monkeypatch.setattr(tiers, "STRETCH", 20)
    asked = []
    rivals = tiers.Search._rivals

    def counted(self, start, some, row):
        asked.append(len(row))
        return rivals(self, start, some, row)

    monkeypatch.setattr(tiers.Search, "_rivals", counted)
    queries, pool = clustered(6, [9], 3, 3.0), clustered(200, [5], 4, 3.0)
    assert not nearest(queries, pool, screen=3).certified.any()
    assert asked[0] == 6 and sum(asked) < 4 * 6


def test_summary_is_of_the_weighted_mean():
    pool = clustered(3, [5], 1)
    weights = torch.nn.functional.normalize(torch.rand(15, generator=torch.Generator().manual_seed(0)).view(3, 5), p=1)
    found = Summary.of(pool.weighted(weights.flatten()))
    mean = (pool.values.view(3, 5, 8) * weights[..., None]).sum(1)
    centred = pool.values.view(3, 5, 8) - mean[:, None]
    covariance = (centred * weights[..., None]).transpose(1, 2) @ centred
    assert torch.allclose(found.direction * found.length[:, None], mean, atol=1e-6)
    assert torch.allclose(found.radius, centred.norm(dim=2).amax(1), atol=1e-6)
    assert torch.allclose(found.variance, covariance.flatten(1).norm(dim=1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pool_on_disk_is_searched_where_it_lies(tmp_path, dtype):
    queries, pool = clustered(5, [9], 11), clustered(50, [4, 7], 12).to(dtype)
    save(pool, tmp_path / "pool")
    mapped = load(tmp_path / "pool")
    assert mapped.values.dtype == dtype and torch.equal(mapped.values, pool.values)
    assert torch.equal(mapped.offsets, pool.offsets) and mapped.weights is None
    assert torch.equal(nearest(queries, mapped, 3).index, nearest(queries, pool, 3).index)
    with pytest.raises(FileExistsError, match=r"folder: .* holds feature sets already"):
        save(pool, tmp_path / "pool")
    weighted = pool.weighted(torch.rand(len(pool.values)))
    save(weighted, tmp_path / "weighted")
    assert torch.equal(load(tmp_path / "weighted").weights, weighted.weights)


def test_memory_beyond_the_features_does_not_grow_with_the_pool(monkeypatch):
    """No tensor made during a search is as large as the pool, and twice the pool makes none larger."""
    monkeypatch.setattr(tiers, "STRETCH", 64)
    monkeypatch.setattr(tiers, "BLOCK", 32)
    monkeypatch.setattr(tiers, "KEPT", 0)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None and out.untyped_storage().data_ptr() not in owned:
                self.seen = max(self.seen, out.untyped_storage().nbytes())
            return out

    seen = []
    for m in (512, 1024, 2048):
        queries, pool = clustered(4, [9], 13), clustered(m, [4, 7], 14)
        owned = {t.untyped_storage().data_ptr() for t in (pool.values, pool.offsets, queries.values)}
        with Largest() as largest:
            nearest(queries, pool, 2, validate=False)
        seen.append(largest.seen)
    assert seen[0] < pool.values.nbytes / 4 and seen[2] <= 1.2 * seen[0]


def test_equal_candidates_go_by_position():
    pool = clustered(1, [4], 7).take([0] * 9)
    found = nearest(clustered(3, [5], 8), pool, 4, screen=9)
    assert torch.equal(found.index, torch.arange(4).expand(3, -1))


def test_no_gradient_is_recorded():
    queries, pool = clustered(2, [3], 1), clustered(4, [2], 2)
    queries.values.requires_grad_()
    assert not nearest(queries, pool).value.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k: expected an integer from 1 to the pool's 4 sets, got 5"),
        ({"k": 0}, "k: .*got 0"),
        ({"k": 3, "screen": 2}, "screen: .*k = 3, got 2"),
        ({"screen": "fast"}, "screen: .*got 'fast'"),
        ({"epsilon": -0.1}, "epsilon: .*got -0.1"),
        ({"summary": Summary.of(clustered(3, [2], 2))}, r"summary: expected one of the pool's \[4, 8\], got \[3, 8\]"),
        ({"iterations": 0}, "iterations: .*got 0"),
        (
            {"pooled_pool": torch.ones(4, 3)},
            "pooled_queries: expected pooled vectors beside pooled_pool, got None",
        ),
        ({"pooled_queries": torch.ones(2, 3)}, "pooled_pool: expected pooled vectors beside pooled_queries"),
        (
            {"pooled_queries": torch.ones(2, 3), "pooled_pool": torch.ones(3, 3)},
            r"pooled_pool: expected \[4, e\]",
        ),
        (
            {"pooled_queries": torch.ones(2, 3), "pooled_pool": torch.ones(4, 2)},
            "pooled_pool: expected dim 3",
        ),
        (
            {"pooled_queries": torch.ones(2, 3) * torch.nan, "pooled_pool": torch.ones(4, 3)},
            "pooled_queries: holds NaN or inf",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    queries, pool = clustered(2, [3], 1), clustered(4, [2], 2)
    with pytest.raises(ValueError, match=message):
        nearest(queries, pool, **change)


def test_bad_sets_are_refused_by_name():
    queries, pool = clustered(2, [3], 1), clustered(4, [2], 2)
    with pytest.raises(ValueError, match="pool: expected vectors of dim 8 as in queries, got 3"):
        nearest(queries, clustered(4, [2], 2, dim=3))
    with pytest.raises(ValueError, match="pool: expected unit vectors"):
        nearest(queries, FeatureSets(pool.values * 3, pool.offsets))
    with pytest.raises(ValueError, match="queries: expected at least one set"):
        nearest(queries.take([]), pool)
