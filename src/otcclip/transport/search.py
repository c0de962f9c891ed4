"""The nearest sets of a pool by OT_ε, without solving the whole pool.

Five tiers, each dearer a pair than the one before. *Screen*: cosines of pooled vectors, one GEMM, name a few sets to
solve first, so that there is a value to beat. *Pooled bound* (`bounds`): the same kind of GEMM rules out what
cannot beat it. *Half step*: the dual value after half an iteration, one GEMM over all vectors (in bfloat16 where the
processor has it) and an exponential a cell. *Dual bound*: that of a few iterations, below which no later iterate
falls. *Solve*: what is left, to the full count.

What is ranked is the dual value at the full count, and neither bound is above it, so the answer is that of brute
force. The pool streams through in stretches: beyond its features (and their summary, if kept) memory is one
stretch, and k answers a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from otcclip.transport.backends import STABLE_BELOW
from otcclip.transport.bounds import Summary, cosine_needed
from otcclip.transport.gradient import full_precision
from otcclip.transport.problem import FeatureSets
from otcclip.transport.solve import Backend, all_costs, check_operands, half_step, pair_costs, settings, solved_in

# Iterations behind the dual bound: after 3 of them 1.5 of 100,000 candidates are left (TRANSPORT section 3).
BOUND_ITERATIONS = 3
# Pool sets solved first for each query, by pooled cosine, so that the bounds already have a rival to beat.
SEEDS = 4
# Pool sets gathered at a time for the first solves.
SEEDED = 4096
# Pool sets in a stretch of the sweep, and queries served by one pass over the pool.
STRETCH = 8192
QUERIES = 256
# Pool sets whose transport is bounded at a time, and the share of a block's pairs from which the whole block is.
BLOCK = 512
DENSE = 0.3
# Numbers of a summary made on the way that are kept for the second pass (64 MB); past them it is made again.
KEPT = 1 << 24
# Room for float32 rounding between a bound and a value, and for scores made by a bfloat16 GEMM.
_SLACK, _HALF_SLACK = 1e-5, 0.006


@dataclass(frozen=True)
class Nearest:
    """The `k` nearest pool sets of `n` queries, nearest first.

    Attributes:
        index: positions in the pool.
        value: OT_ε, the dual value at the full iteration count, in units of cost.
        certified: True where the answer is known to be that of brute force over the whole pool.
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
    summary: Summary | None = None,
    backend: Backend = "auto",
    validate: bool = True,
) -> Nearest:
    """The k pool sets nearest to each query by OT_ε.

    Args:
        queries, pool: `n` and `m` sets of unit vectors of one dimension. The pool may be on disk (`storage.load`).
        k: how many, at most `m`.
        epsilon, iterations, backend: as in `pair_costs`.
        screen: `"exact"` ranks the whole pool, pruned by bounds; an integer K >= k solves only the K pool sets of
            highest pooled cosine, and certifies the queries for which the pooled bound rules out the rest.
        pooled_queries, pooled_pool: unit pooled vectors for the screen (and, when exact, for the order of
            work); the normalised mean of each set if not given. Both or neither.
        summary: `Summary.of(pool)`, to make it once for many calls; in bfloat16 for large pools.
        validate: check that all vectors are finite and of unit norm, one pass over the pool.

    Raises:
        ValueError: an argument is out of range or does not fit another; the message names it.
    """
    settings(epsilon, iterations)
    check_operands(queries, pool, "queries", "pool", validate)
    if not isinstance(k, int) or not 1 <= k <= len(pool):
        raise ValueError(f"k: expected an integer from 1 to the pool's {len(pool)} sets, got {k!r}")
    if screen != "exact" and (not isinstance(screen, int) or screen < k):
        raise ValueError(f"screen: expected 'exact' or an integer >= k = {k}, got {screen!r}")
    if summary is not None and (len(summary) != len(pool) or summary.direction.shape[1] != pool.dim):
        shape = list(summary.direction.shape)
        raise ValueError(f"summary: expected one of the pool's [{len(pool)}, {pool.dim}], got {shape}")
    _check_pooled(queries, pool, pooled_queries, pooled_pool)
    width = min(len(pool), max(k, SEEDS) if screen == "exact" else screen)
    parts: list[Nearest] = []
    kept: dict[int, Summary] = {}
    with full_precision(queries.values):
        for start in range(0, len(queries), QUERIES):
            stop = min(start + QUERIES, len(queries))
            pooled = None if pooled_queries is None else pooled_queries[start:stop]
            search = _Search(queries.stretch(start, stop), pool, summary, k, epsilon, iterations, backend, kept)
            search.solve_seeds(_screen(search, pooled, pooled_pool, width))
            certified = search.sweep(only_certify=screen != "exact")
            parts.append(Nearest(search.index, search.value, certified, search.solved))
    return Nearest(*(torch.cat([getattr(part, name) for part in parts]) for name in Nearest.__dataclass_fields__))


class _Options(TypedDict):
    epsilon: float
    iterations: int
    backend: Backend
    validate: bool


class _Search:
    """The k best so far of each query, by value and then by position, and the tiers that improve them."""

    def __init__(
        self,
        queries: FeatureSets,
        pool: FeatureSets,
        summary: Summary | None,
        k: int,
        epsilon: float,
        iterations: int,
        backend: Backend,
        kept: dict[int, Summary],
    ) -> None:
        self.queries, self.pool, self.summary, self.epsilon = queries, pool, summary, epsilon
        self.iterations, self.backend = iterations, backend
        self.kept = kept
        self.half_dtype = _half_dtype(queries, pool)
        self.peaks: dict[int, Tensor] = {}  # by stretch: each query's largest cosine in it
        self.means = Summary.of(queries)
        n, device = len(queries), queries.values.device
        self.value = torch.full((n, k), torch.inf, dtype=solved_in(queries, pool), device=device)
        self.index = torch.full((n, k), len(pool), device=device)
        self.solved = torch.zeros(n, dtype=torch.int64, device=device)
        self.seeds = torch.empty(n, 0, dtype=torch.int64, device=device)

    def summarised(self, start: int, stop: int) -> Summary:
        """A stretch of the pool's summary: the caller's, or made now and kept while there is room."""
        if self.summary is not None:
            return self.summary.stretch(start, stop)
        if start not in self.kept:
            made = Summary.of(self.pool.stretch(start, stop))
            if stop * self.pool.dim > KEPT:
                return made
            self.kept[start] = made
        return self.kept[start]

    def solve_seeds(self, candidates: Tensor) -> None:
        """Solve `candidates [n, c]`, distinct pool positions of each query."""
        self.seeds = candidates
        step = max(1, SEEDED // candidates.shape[1])
        for start in range(0, len(candidates), step):
            part = candidates[start : start + step]
            query = torch.arange(start, start + len(part), device=part.device).repeat_interleave(part.shape[1])
            position, local = part.unique(return_inverse=True)
            self.offer(query, local.flatten(), self.pool.take(position), position)

    def sweep(self, only_certify: bool) -> Tensor:
        """Solve every pair that the bounds do not rule out; or only say for which queries there is none."""
        certified = torch.ones(len(self.queries), dtype=torch.bool, device=self.value.device)
        if self.seeds.shape[1] >= len(self.pool):
            return certified
        for start in range(0, len(self.pool), STRETCH):
            stop = min(start + STRETCH, len(self.pool))
            # A query that has lost its certificate needs no further look.
            undecided = certified.nonzero()[:, 0]
            if not len(undecided):
                break
            query, candidate = self._rivals(start, self.summarised(start, stop), undecided)
            if only_certify:
                certified[query] = False
            elif len(query):
                self._bound(query, candidate, start, stop)
        return certified

    def _rivals(self, start: int, some: Summary, row: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (query, pool position) of a stretch that the pooled bound does not rule out, seeds aside, for the
        queries `row`."""
        target = self.value[:, -1] + _SLACK
        reach = some.reach(self.epsilon)
        needed = cosine_needed(self.means, some, reach, target.float())
        peak = self.peaks.get(start)
        # Where the screen has seen these very cosines, their largest says for most queries that none will do.
        row = row if peak is None else row[(peak >= needed)[row]]
        cosine = (self.means.direction[row].to(some.direction.dtype) @ some.direction.T).float()
        query, column = (cosine >= needed[row, None]).nonzero(as_tuple=True)
        cosine, query = cosine[query, column], row[query]
        similar = (cosine + some.slack) * self.means.length[query] * some.length[column]
        bound = 1 - reach[column] - similar
        keep = bound <= target[query]
        query, column = query[keep], column[keep]
        fresh = ~(self.seeds[query] == (column + start)[:, None]).any(1)
        return query[fresh], column[fresh] + start

    def _bound(self, query: Tensor, candidate: Tensor, start: int, stop: int) -> None:
        """Half step and dual bound, a block of the pool at a time, and the solve of what they leave."""
        first = min(BOUND_ITERATIONS, self.iterations)
        how = _Options(epsilon=self.epsilon, iterations=first, backend=self.backend, validate=False)
        order = candidate.argsort(stable=True)
        query, candidate = query[order], candidate[order]
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            inside = slice(*torch.searchsorted(candidate, torch.tensor([low, high], device=candidate.device)).tolist())
            i, j = query[inside], candidate[inside] - low
            if not len(i):
                continue
            some = self.pool.stretch(low, high)
            # In logarithms the half step would cost as much as it saves.
            if self.epsilon >= STABLE_BELOW:
                i, j = self._half_step(i, j, some)
                if not len(i):
                    continue
            if self._is_dense(i, some):
                bound = all_costs(self.queries, some, **how).value[i, j]
            else:
                bound = pair_costs(self.queries, some, pairs=(i, j), **how).value
            self._solve_contenders(i, j, bound, some, torch.arange(low, high, device=i.device))

    def _is_dense(self, query: Tensor, some: FeatureSets) -> bool:
        return len(query) >= DENSE * len(self.queries) * len(some)

    def _half_step(self, query: Tensor, local: Tensor, some: FeatureSets) -> tuple[Tensor, Tensor]:
        """Those of the pairs whose dual value after half an iteration is below the value to beat."""
        dense = self._is_dense(query, some)
        bound = half_step(
            self.queries,
            some,
            epsilon=self.epsilon,
            backend=self.backend,
            pairs=None if dense else (query, local),
            gemm_dtype=self.half_dtype,
        )
        bound = bound[query, local] if dense else bound
        slack = _SLACK if self.half_dtype is None else _HALF_SLACK
        keep = bound <= self.value[query, -1] + slack
        return query[keep], local[keep]

    def _solve_contenders(
        self, query: Tensor, local: Tensor, bound: Tensor, some: FeatureSets, position: Tensor
    ) -> None:
        """Each query's best by bound first: it lowers the value to beat for the rest of the block."""
        best = torch.full((len(self.queries),), torch.inf, dtype=bound.dtype, device=bound.device)
        best = best.scatter_reduce(0, query, bound, "amin")
        first = bound <= best[query]
        for chosen in (first, ~first):
            chosen = chosen & (bound <= self.value[query, -1] + _SLACK)
            if bool(chosen.any()):
                self.offer(query[chosen], local[chosen], some, position)

    def offer(self, query: Tensor, candidate: Tensor, sets: FeatureSets, position: Tensor) -> None:
        """Solve pairs `(query, candidate)` `[c]` to the full count and keep what is best.

        `candidate` points into `sets`, whose places in the pool are `position`.
        """
        query, order = query.sort(stable=True)
        candidate = candidate[order]
        how = _Options(epsilon=self.epsilon, iterations=self.iterations, backend=self.backend, validate=False)
        costs = pair_costs(self.queries, sets, pairs=(query, candidate), **how).value
        touched, row = torch.unique(query, return_inverse=True)
        count = torch.bincount(row)
        self.solved[touched] += count
        column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        shape = (len(touched), int(count.max()))
        value = costs.new_full(shape, torch.inf).index_put((row, column), costs)
        index = torch.full(shape, len(self.pool), device=row.device).index_put((row, column), position[candidate])
        value = torch.cat([self.value[touched], value], 1)
        index = torch.cat([self.index[touched], index], 1)
        # Position first, then a stable sort by value: equal values go to the lower position.
        index, order = index.sort(1)
        value, order = value.gather(1, order).sort(dim=1, stable=True)
        k = self.value.shape[1]
        self.value[touched] = value[:, :k]
        self.index[touched] = index.gather(1, order)[:, :k]


def _half_dtype(queries: FeatureSets, pool: FeatureSets) -> torch.dtype | None:
    """bfloat16 where its GEMM is the faster one, else (None) the dtype that is solved in."""
    if solved_in(queries, pool) == torch.float64:
        return None
    fast = queries.values.device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else None


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


def _screen(search: _Search, pooled_queries: Tensor | None, pooled_pool: Tensor | None, width: int) -> Tensor:
    """The `width` pool sets of highest pooled cosine for each query, `[n, width]`."""
    n, m, device = len(search.queries), len(search.pool), search.value.device
    score = torch.full((n, 0), -torch.inf, device=device)
    index = torch.empty(n, 0, dtype=torch.int64, device=device)
    for start in range(0, m, STRETCH):
        stop = min(start + STRETCH, m)
        if pooled_queries is not None and pooled_pool is not None:
            fresh = pooled_queries.float() @ pooled_pool[start:stop].float().T
        else:
            some = search.summarised(start, stop)
            fresh = search.means.direction.to(some.direction.dtype) @ some.direction.T
            search.peaks[start] = fresh.amax(1).float()
        score, index = _merge(score, index, fresh, start, width)
    return index


def _merge(score: Tensor, index: Tensor, fresh: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best of what was kept and a fresh stretch `[n, s]`; after the first few stretches nearly none."""
    if score.shape[1] < width:
        position = torch.arange(start, start + fresh.shape[1], device=fresh.device).expand(len(fresh), -1)
        score, index = torch.cat([score, fresh.float()], 1), torch.cat([index, position], 1)
    else:
        hit = (fresh.amax(1).float() > score[:, -1]).nonzero()[:, 0]
        row, column = (fresh[hit].float() > score[hit, -1:]).nonzero(as_tuple=True)
        if not len(row):
            return score, index
        row = hit[row]
        count = torch.bincount(row, minlength=len(fresh))
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        extra = score.new_full((len(fresh), int(count.max())), -torch.inf)
        where = index.new_zeros(extra.shape)
        score = torch.cat([score, extra.index_put((row, place), fresh[row, column].float())], 1)
        index = torch.cat([index, where.index_put((row, place), column + start)], 1)
    score, order = score.topk(min(width, score.shape[1]), dim=1)
    return score, index.gather(1, order)
