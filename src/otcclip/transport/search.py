"""The nearest sets of a pool by OT_ε, without solving the whole pool.

Two tiers. *Bound*: a few Sinkhorn iterations give a dual value, which no later iterate falls below. *Solve*:
only candidates whose bound does not already exceed the k-th best value found are solved to the full count.
What is ranked
is the dual value at the full count, so what the bound rules out cannot have been among the k nearest: the
answer is that of brute force. Memory is a tile and k answers a query, whatever the size of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from otcclip.transport import sinkhorn, tiles
from otcclip.transport.backends import Problem
from otcclip.transport.gradient import full_precision
from otcclip.transport.problem import FeatureSets
from otcclip.transport.solve import check_operands, pair_costs, promote, settings

# Iterations behind the bound: after 3 of them 1.5 of 100,000 candidates are left (TRANSPORT section 3).
BOUND_ITERATIONS = 3
# Pool sets solved first for each query, by pooled cosine, so that the first bound already has a rival to
# beat.
_SEEDS = 4
# Room for float32 rounding between a bound and a value.
_SLACK = 1e-5
# Pool sets and queries a step of the pooled screen.
_SCREEN_SETS = 4096
_SCREEN_QUERIES = 256


@dataclass(frozen=True)
class Nearest:
    """The `k` nearest pool sets of `n` queries, nearest first.

    Attributes:
        index: positions in the pool.
        value: OT_ε, the dual value at the full iteration count, in units of cost.
        certified: True where the answer is that of brute force over the whole pool.
        solved: how many pool sets were solved to the full count.
    """

    index: Int64[Tensor, "n k"]
    value: Float[Tensor, "n k"]
    certified: Bool[Tensor, " n"]
    solved: Int64[Tensor, " n"]


@torch.no_grad()
def nearest(
    queries: FeatureSets,
    pool: FeatureSets,
    k: int = 1,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    screen: Literal["exact"] | int = "exact",
    pooled_queries: Float[Tensor, "n e"] | None = None,
    pooled_pool: Float[Tensor, "m e"] | None = None,
    validate: bool = True,
) -> Nearest:
    """The k pool sets nearest to each query by OT_ε.

    Args:
        queries, pool: `n` and `m` sets of unit vectors of one dimension.
        k: how many, at most `m`.
        epsilon, iterations: as in `pair_costs`.
        screen: `"exact"` ranks the whole pool, pruned by dual bounds; an integer K >= k ranks only the K pool
            sets of highest pooled cosine, and is certified only where K covers the pool.
        pooled_queries, pooled_pool: unit pooled vectors for the screen (and, when exact, for the order of
            work); the normalised mean of each set if not given. Both or neither.
        validate: check that all vectors are finite and of unit norm.

    Raises:
        ValueError: an argument is out of range or does not fit another; the message names it.
    """
    settings(epsilon, iterations)
    check_operands(queries, pool, "queries", "pool", validate)
    if not isinstance(k, int) or not 1 <= k <= len(pool):
        raise ValueError(f"k: expected an integer from 1 to the pool's {len(pool)} sets, got {k!r}")
    if screen != "exact" and (not isinstance(screen, int) or screen < k):
        raise ValueError(f"screen: expected 'exact' or an integer >= k = {k}, got {screen!r}")
    _check_pooled(queries, pool, pooled_queries, pooled_pool)
    queries, pool = promote(queries, pool)
    search = _Search(queries, pool, k, epsilon, iterations)
    with full_precision(queries.values):
        width = min(len(pool), max(k, _SEEDS) if screen == "exact" else screen)
        search.solve_seeds(_screen(queries, pool, width, pooled_queries, pooled_pool))
        if screen == "exact":
            search.sweep()
    certified = torch.full_like(search.solved, screen == "exact" or width >= len(pool), dtype=torch.bool)
    return Nearest(search.index, search.value, certified, search.solved)


class _Search:
    """The k best so far of each query, by value and then by position, and the tiers that improve them."""

    def __init__(self, queries: FeatureSets, pool: FeatureSets, k: int, epsilon: float, iterations: int) -> None:
        self.queries, self.pool, self.epsilon, self.iterations = queries, pool, epsilon, iterations
        n, device = len(queries), queries.values.device
        self.value = queries.values.new_full((n, k), torch.inf)
        self.index = torch.full((n, k), len(pool), device=device)
        self.solved = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds: Tensor | None = None

    def solve_seeds(self, candidates: Tensor) -> None:
        """Solve `candidates [n, c]`, distinct pool positions of each query."""
        self.seeds = candidates
        c = candidates.shape[1]
        step = max(1, tiles.TILE_SCORES // c)
        for start in range(0, len(candidates), step):
            part = candidates[start : start + step]
            query = torch.arange(start, start + len(part), device=part.device).repeat_interleave(c)
            self.offer(query, part.flatten())

    def sweep(self) -> None:
        """Bound every pair, tile by tile, and solve those whose bound does not rule them out."""
        first = min(BOUND_ITERATIONS, self.iterations)
        problem = Problem(self.queries, self.pool, self.queries.shares(), self.pool.shares(), None)
        for strip in tiles.strips(problem):
            x_kpd = self.queries.values[strip.x.rows]
            for block in strip.ys:
                a, b = strip.weights(block)
                s = tiles.as_batch(tiles.scores(x_kpd, self.pool.values[block.rows], False, None))
                found = sinkhorn.solve(s, a, b, self.epsilon, first)
                bound = sinkhorn.dual_value(found, a, b).view(len(strip.x.sets), len(block.sets))
                self._solve_contenders(strip.x.sets, block.sets, bound)

    def _solve_contenders(self, query: Tensor, candidate: Tensor, bound: Tensor) -> None:
        """The best few by bound first: they lower the value to beat for the rest of the tile."""
        contend = bound <= self.value[query, -1:] + _SLACK
        assert self.seeds is not None
        contend &= ~(self.seeds[query][:, None] == candidate[:, None]).any(2)
        if not bool(contend.any()):
            return
        k = min(self.value.shape[1], bound.shape[1])
        best = bound.masked_fill(~contend, torch.inf).topk(k, largest=False).indices
        first = torch.zeros_like(contend).scatter_(1, best, True) & contend
        self._offer_where(query, candidate, first)
        rest = contend & ~first & (bound <= self.value[query, -1:] + _SLACK)
        self._offer_where(query, candidate, rest)

    def _offer_where(self, query: Tensor, candidate: Tensor, chosen: Tensor) -> None:
        i, j = chosen.nonzero(as_tuple=True)
        if len(i):
            self.offer(query[i], candidate[j])

    def offer(self, query: Tensor, candidate: Tensor) -> None:
        """Solve pairs `(query, candidate)` `[c]` to the full count and keep what is best."""
        query, order = query.sort(stable=True)
        candidate = candidate[order]
        costs = pair_costs(
            self.queries.take(query),
            self.pool.take(candidate),
            epsilon=self.epsilon,
            iterations=self.iterations,
            validate=False,
        ).value
        touched, row = torch.unique(query, return_inverse=True)
        count = torch.bincount(row)
        self.solved[touched] += count
        column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        shape = (len(touched), int(count.max()))
        value = costs.new_full(shape, torch.inf).index_put((row, column), costs)
        index = torch.full(shape, len(self.pool), device=row.device).index_put((row, column), candidate)
        value = torch.cat([self.value[touched], value], 1)
        index = torch.cat([self.index[touched], index], 1)
        # Position first, then a stable sort by value: equal values go to the lower position.
        index, order = index.sort(1)
        value, order = value.gather(1, order).sort(dim=1, stable=True)
        k = self.value.shape[1]
        self.value[touched] = value[:, :k]
        self.index[touched] = index.gather(1, order)[:, :k]


def _check_pooled(
    queries: FeatureSets, pool: FeatureSets, pooled_queries: Tensor | None, pooled_pool: Tensor | None
) -> None:
    if (pooled_queries is None) != (pooled_pool is None):
        given, missing = ("pooled_queries", "pooled_pool")[:: 1 if pooled_pool is None else -1]
        raise ValueError(f"{missing}: expected pooled vectors beside {given}, got None")
    if pooled_queries is None or pooled_pool is None:
        return
    for name, pooled, sets in (
        ("pooled_queries", pooled_queries, queries),
        ("pooled_pool", pooled_pool, pool),
    ):
        if pooled.ndim != 2 or len(pooled) != len(sets):
            raise ValueError(f"{name}: expected [{len(sets)}, e], got {list(pooled.shape)}")
        if not bool(pooled.isfinite().all()):
            raise ValueError(f"{name}: holds NaN or inf")
    if pooled_queries.shape[1] != pooled_pool.shape[1]:
        dims = f"{pooled_queries.shape[1]} as in pooled_queries, got {pooled_pool.shape[1]}"
        raise ValueError(f"pooled_pool: expected dim {dims}")


def _screen(
    queries: FeatureSets,
    pool: FeatureSets,
    width: int,
    pooled_queries: Tensor | None,
    pooled_pool: Tensor | None,
) -> Tensor:
    """The `width` pool sets of highest pooled cosine for each query, `[n, width]`."""
    best: list[Tensor] = []
    for start in range(0, len(queries), _SCREEN_QUERIES):
        stop = min(start + _SCREEN_QUERIES, len(queries))
        q = _pooled(queries, pooled_queries, start, stop)
        score, index = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device)
        for first, vectors in _pool_chunks(pool, pooled_pool):
            score = torch.cat([score, q @ vectors.to(q).T], 1)
            fresh = torch.arange(first, first + len(vectors), device=q.device).expand(len(q), -1)
            index = torch.cat([index, fresh], 1)
            score, order = score.topk(min(width, score.shape[1]), dim=1)
            index = index.gather(1, order)
        best.append(index)
    return torch.cat(best)


def _pool_chunks(pool: FeatureSets, pooled: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(pool), _SCREEN_SETS):
        yield start, _pooled(pool, pooled, start, min(start + _SCREEN_SETS, len(pool)))


def _pooled(sets: FeatureSets, pooled: Tensor | None, start: int, stop: int) -> Tensor:
    if pooled is not None:
        return pooled[start:stop].to(sets.values)
    return sets.take(torch.arange(start, stop)).pooled()
