"""Which sets are solved together: blocks of sets of like size, and strips of tiles made from them.

A tile is one GEMM and one batched solve, small enough that its kernel stays in a core's cache. Sets are
sorted by size and cut into blocks so that a tile holds little padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.transport.backends.base import Problem
from otcclip.transport.problem import FeatureSets

# Scores a tile: with its transpose 1 MB of float32, about one core's L2 cache (measured flat from 64 k to 256
# k).
TILE_SCORES = 1 << 17
# Sets of x in a tile of all_costs: enough rows for a full-speed GEMM and few enough that a block of y stays
# long.
STRIP_SETS = 16
# A block may hold this much padding as a share of its largest set. A block too small to fill a tile takes
# more, since a tile's fixed cost (about 100 small tensor calls) then outweighs the padded arithmetic.
_PADDING = 0.15


@dataclass(frozen=True)
class Block:
    """Sets padded to a common size m: `rows [k, m]` into the packed values, `weights [k, m]`.

    `sets [k]` is where their answers go: along its axis of the grid, or in the list of pairs.
    """

    sets: Tensor
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, features: FeatureSets, shares: Tensor, index: Tensor, places: Tensor | None = None) -> Block:
        """The sets at `index` with their packed `shares`; their answers go to `places`, else to `index`."""
        rows, mask = features.rows(index)
        device = shares.device
        weights = shares[rows.to(device)] * mask.to(shares)
        return cls((index if places is None else places).to(device), rows.to(device), weights)


@dataclass(frozen=True)
class Strip:
    """One block of x against blocks of y: every pair of the two, or set i against set i if `paired`."""

    x: Block
    ys: Sequence[Block]
    paired: bool

    def weights(self, y: Block) -> tuple[Tensor, Tensor]:
        """Marginals of the tile's pairs: `[B, p]`, `[B, t]`."""
        if self.paired:
            return self.x.weights, y.weights
        k, j = len(self.x.sets), len(y.sets)
        a = self.x.weights[:, None].expand(k, j, -1)
        b = y.weights[None].expand(k, j, -1)
        return a.reshape(k * j, -1), b.reshape(k * j, -1)


def scores(x_kpd: Tensor, y_jtd: Tensor, paired: bool, gemm_dtype: torch.dtype | None) -> Tensor:
    """S = V Tᵀ as the GEMM leaves it: `[k, p, t]` if paired, else `[k, p, j, t]`; in x's dtype."""
    dtype = x_kpd.dtype
    if gemm_dtype is not None:
        x_kpd, y_jtd = x_kpd.to(gemm_dtype), y_jtd.to(gemm_dtype)
    if paired:
        return torch.bmm(x_kpd, y_jtd.transpose(1, 2)).to(dtype)
    (k, p, _), (j, t, _) = x_kpd.shape, y_jtd.shape
    return (x_kpd.flatten(0, 1) @ y_jtd.flatten(0, 1).T).to(dtype).view(k, p, j, t)


def as_batch(scores_: Tensor) -> Tensor:
    """`[k, p, j, t]` as a contiguous batch of pairs `[k·j, p, t]`; a paired `[k, p, t]` as it is."""
    return scores_ if scores_.ndim == 3 else scores_.transpose(1, 2).flatten(0, 1).contiguous()


def blocks(features: FeatureSets, shares: Tensor, per_set: int, most: int | None = None) -> Iterator[Block]:
    """Blocks of `features`, smallest sets first; `per_set` scores are needed for each vector of a set."""
    sizes = features.sizes
    order = sizes.argsort(stable=True)
    ordered = sizes[order]
    start = 0
    while start < len(order):
        stop = _block_end(ordered, start, per_set, most)
        yield Block.of(features, shares, order[start:stop])
        start = stop


def _block_end(ordered: Tensor, start: int, per_set: int, most: int | None) -> int:
    """The end of the longest block from `start` that fits a tile, within the padding allowed to its size."""
    window = ordered[start : start + (most or TILE_SCORES)]
    if most is None:
        window = window[: max(1, TILE_SCORES // (per_set * int(ordered[start])))]
    count = torch.arange(1, len(window) + 1)
    area = count * window * per_set
    lean = window * (1 - _PADDING) <= ordered[start]
    allowed = (area <= TILE_SCORES) & (lean | (area <= TILE_SCORES // 4))
    allowed[0] = True
    # Sizes rise, so do the areas: what is allowed is a prefix.
    return start + int(allowed.sum())


def strips(problem: Problem) -> Iterator[Strip]:
    """Strips that cover the problem's pairs, each once."""
    if problem.pairs is None:
        return _grid(problem)
    return _pairs(problem, *problem.pairs)


def _grid(problem: Problem) -> Iterator[Strip]:
    per_set = 0
    ys: list[Block] = []
    for block in blocks(problem.x, problem.a, 1, most=STRIP_SETS):
        need = block.rows.numel()
        if need != per_set:  # an equal patch count, the common case, cuts y once
            ys, per_set = list(blocks(problem.y, problem.b, need)), need
        yield Strip(block, ys, False)


def _pairs(problem: Problem, x_index: Tensor, y_index: Tensor) -> Iterator[Strip]:
    """Sorted by size, so that little is padding."""
    p, t = problem.x.sizes[x_index], problem.y.sizes[y_index]
    order = (p * (int(t.max()) + 1) + t).argsort(stable=True)
    start = 0
    while start < len(order):
        # The scores a pair needs are bounded by the largest of each side in the window.
        window = order[start : start + TILE_SCORES]
        area = torch.arange(1, len(window) + 1) * p[window].cummax(0).values * t[window].cummax(0).values
        chosen = order[start : start + max(1, int((area <= TILE_SCORES).sum()))]
        x = Block.of(problem.x, problem.a, x_index[chosen], chosen)
        yield Strip(x, [Block.of(problem.y, problem.b, y_index[chosen], chosen)], True)
        start += len(chosen)
