"""The nearest sets of a pool by OT_ε, without solving the whole pool.

Five tiers, each dearer a pair than the one before. *Screen* (`screen`): cosines of pooled vectors, one GEMM, name a few
sets to solve first, so that there is a value to beat. The others (`tiers`): *Pooled bound* (`bounds`): the same kind of
GEMM rules out what cannot beat it. *Half step*: the dual value after half an iteration, one GEMM over all vectors (in
bfloat16 where the processor has it) and an exponential a cell. *Dual bound*: that of a few iterations, below which no
later iterate falls. *Solve*: what is left, to the full count.

What is ranked is the dual value at the full count, and neither bound is above it, so the answer is that of brute
force. The pool streams through in stretches: beyond its features (and their summary, if kept) memory is one
stretch, and k answers a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from otcclip.transport.bounds import Summary
from otcclip.transport.gradient import full_precision
from otcclip.transport.problem import FeatureSets
from otcclip.transport.screen import screened
from otcclip.transport.solve import Backend, check_operands, settings
from otcclip.transport.tiers import Search

# Pool sets solved first for each query, by pooled cosine, so that the bounds already have a rival to beat.
SEEDS = 4
# Queries served by one pass over the pool.
QUERIES = 256


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
            search = Search(queries.stretch(start, stop), pool, summary, k, epsilon, iterations, backend, kept)
            search.solve_seeds(screened(search, pooled, pooled_pool, width))
            certified = search.sweep(only_certify=screen != "exact")
            parts.append(Nearest(search.index, search.value, certified, search.solved))
    return Nearest(*(torch.cat([getattr(part, name) for part in parts]) for name in Nearest.__dataclass_fields__))


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
