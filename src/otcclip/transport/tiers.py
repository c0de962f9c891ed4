"""What an exact search does with the pairs that its screen has not solved: bound them, and solve those that are left.

The tiers of `search` after its screen, each dearer than the one before; a pair that one of them rules out never reaches
the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import torch
from torch import Tensor

from otcclip.transport.backends import STABLE_BELOW
from otcclip.transport.bounds import Summary, cosine_needed
from otcclip.transport.problem import FeatureSets
from otcclip.transport.solve import Backend, all_costs, half_step, pair_costs, solved_in

# Iterations behind the dual bound: after 3 of them 1.5 of 100,000 candidates are left (TRANSPORT section 3).
BOUND_ITERATIONS = 3
# Pool sets gathered at a time for the first solves.
SEEDED = 4096
# Pool sets in a stretch of the sweep.
STRETCH = 8192
# Pool sets whose transport is bounded at a time, and the share of a block's pairs from which the whole block is.
BLOCK = 512
DENSE = 0.3
# Numbers of a summary made on the way that are kept for the second pass (64 MB); past them it is made again.
KEPT = 1 << 24
# Room for float32 rounding between a bound and a value, and for scores made by a bfloat16 GEMM.
_SLACK, _HALF_SLACK = 1e-5, 0.006


class _Options(TypedDict):
    epsilon: float
    iterations: int
    backend: Backend
    validate: bool


class Search:
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

    def stretches(self) -> Iterator[tuple[int, int]]:
        """Where each stretch of the pool starts and stops."""
        for start in range(0, len(self.pool), STRETCH):
            yield start, min(start + STRETCH, len(self.pool))

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
        for start, stop in self.stretches():
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
