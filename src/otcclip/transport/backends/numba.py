"""Transport on a CPU in float32: one GEMM a tile by torch, then each pair's Sinkhorn in cache by numba (`pairs`).

Scores are made as Sᵀ, tokens by patches, so that a pair's patches lie side by side for the vector unit (`gemms`). A
list of pairs is solved grouped by x: the candidates of an image cost one read of its patches, and sets of x that meet
about as many vectors share one batched product. A kernel sees no padding.

Threads are torch's (`torch.set_num_threads`), on stretches of the list of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.transport.backends import torch as portable
from otcclip.transport.backends.base import STABLE_BELOW, Problem, Settings, Solved
from otcclip.transport.backends.gemms import PADDING, Each, Gemms, Ints, Together
from otcclip.transport.backends.pairs import half_step_pairs, pull_pairs, solve_pairs
from otcclip.transport.backends.simd import LANES

Floats = NDArray[np.float32]

# Scores a tile: 1 MB, a core's L2 cache.
TILE_SCORES = 1 << 18
# Sets of x a tile of the grid: enough rows for a full-speed GEMM.
STRIP_SETS = 16
# Vectors of y gathered at a time for a list of pairs.
GATHERED = 1 << 14
# Scores that are kept for a gradient, 8 MB: a batch's alignment loss. Of more they are made anew: memory is one tile.
KEPT_SCORES = 1 << 21
# Scores of a pair, and pairs, from which a GEMM each is worth its call where no set of x is shared.
_TINY, _MANY = 512, 256
# Pairs that are worth a thread.
_THREAD_PAIRS = 64


@dataclass(frozen=True)
class _Kept:
    """f and g over ε of every pair, flat; where a pair's begin is computed as `solve` did.

    `tiles`: the tiles with their scores where all of them are few; a gradient uses them up.
    """

    f: Floats
    g: Floats
    tiles: list[tuple[_Tile, Tensor]]


@dataclass(frozen=True)
class _Tile:
    """Some pairs, and where everything of each is.

    Attributes:
        gemms: how its scores are made; where they lie is theirs to say.
        where: of each pair the first score, the scores' row stride, p, t, and where its a, b, f and g begin.
        place: where the answers go.
    """

    gemms: Gemms
    where: tuple[Ints, ...]
    place: Any

    def part(self, part: slice) -> tuple[Ints, ...]:
        """`where`, of some of the pairs."""
        return tuple(column[part] for column in self.where)


def solve(x: Tensor, y: Tensor, problem: Problem, how: Settings, keep: bool) -> Solved:
    """See `Backend.solve`."""
    if _only_portable(problem, how, keep):
        return portable.solve(x, y, problem, how, keep)
    x, y = x.detach(), y.detach()
    value, error = torch.empty(problem.shape), torch.empty(problem.shape)
    iterations = torch.empty(problem.shape, dtype=torch.int64)
    shares = problem.a.numpy(), problem.b.numpy()
    f, g = (np.empty(n if keep else 0, np.float32) for n in _potentials(problem))
    kept = _Kept(f, g, tiles=[])
    room = KEPT_SCORES if keep else 0
    stable = how.epsilon < STABLE_BELOW
    options = (how.epsilon, how.iterations, how.tolerance or 0.0, stable, how.sharp, keep)
    for tile in _tiles(problem):
        s = tile.gemms.scores(x, y, how.gemm_dtype)
        room -= len(s)
        if room >= 0:
            kept.tiles.append((tile, s))
        n = len(tile.where[0])
        out = np.empty(n, np.float32), np.empty(n, np.int64), np.empty(n, np.float32)
        scratch = 2 * (int(tile.where[2].max()) + LANES) * (int(tile.where[3].max()) + LANES)

        def work(part: slice, tile: _Tile = tile, s: Tensor = s, out: Any = out, scratch: int = scratch) -> None:
            answers = *(column[part] for column in out), kept.f, kept.g
            solve_pairs(s.numpy(), tile.part(part), shares, options, torch.empty(scratch).numpy(), answers)

        _spread(work, n)
        for target, source in zip((value, iterations, error), out, strict=True):
            target[tile.place] = torch.from_numpy(source).view(target[tile.place].shape)
    if room < 0:
        kept.tiles.clear()
    return Solved(value, iterations, error, kept)


def pull(
    x: Tensor, y: Tensor, problem: Problem, how: Settings, saved: Any, grad: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """See `Backend.pull`."""
    if _only_portable(problem, how, True):
        return portable.pull(x, y, problem, how, saved, grad, need)
    grad_x, grad_y = (torch.zeros_like(v) if needed else None for v, needed in zip((x, y), need, strict=True))
    shares = problem.a.numpy(), problem.b.numpy()
    again = ((tile, tile.gemms.scores(x, y, how.gemm_dtype)) for tile in _tiles(problem))
    kept: Iterable[tuple[_Tile, Tensor]] = list(saved.tiles) or again
    saved.tiles.clear()
    for tile, s in kept:
        upstream = grad[tile.place].reshape(-1).contiguous().numpy()

        def work(part: slice, tile: _Tile = tile, s: Tensor = s, upstream: Floats = upstream) -> None:
            potentials = saved.f, saved.g
            pull_pairs(s.numpy(), tile.part(part), shares, how.epsilon, potentials, upstream[part])

        _spread(work, len(tile.where[0]))
        tile.gemms.pull(s, x, y, (grad_x, grad_y), how.gemm_dtype)
    return grad_x, grad_y


def half_step(x: Tensor, y: Tensor, problem: Problem, how: Settings) -> Tensor:
    """See `Backend.half_step`."""
    if how.epsilon < STABLE_BELOW or _only_portable(problem, how, False):
        return portable.half_step(x, y, problem, how)
    value = torch.empty(problem.shape)
    shares = problem.a.numpy(), problem.b.numpy()
    for tile in _tiles(problem):
        s = tile.gemms.scores(x, y, how.gemm_dtype)
        out = np.empty(len(tile.where[0]), np.float32)

        def work(part: slice, tile: _Tile = tile, s: Tensor = s, out: Floats = out) -> None:
            half_step_pairs(s.numpy(), tile.part(part), shares, how.epsilon, out[part])

        _spread(work, len(out))
        value[tile.place] = torch.from_numpy(out).view(value[tile.place].shape)
    return value


def _only_portable(problem: Problem, how: Settings, keep: bool) -> bool:
    """Partial transport, the gradient of the sharp value (a linear system a pair), and many tiny pairs that share no
    x: one GEMM each, called from Python, costs more there than a padded batch of them (measured at 16 × 6)."""
    if how.mass < 1 or (how.sharp and keep):
        return True
    if problem.pairs is None or len(problem.pairs[0]) < _MANY:
        return False
    rows, columns = problem.pairs
    area = (problem.x.sizes[rows] * problem.y.sizes[columns]).double().mean()
    return bool(area < _TINY) and len(rows.unique()) > len(rows) / 2


def _potentials(problem: Problem) -> tuple[int, int]:
    """How many numbers f and g of every pair take."""
    if problem.pairs is None:
        return len(problem.y) * len(problem.a), len(problem.x) * len(problem.b)
    rows, columns = problem.pairs
    return int(problem.x.sizes[rows].sum()), int(problem.y.sizes[columns].sum())


def _tiles(problem: Problem) -> Iterator[_Tile]:
    return _grid(problem) if problem.pairs is None else _listed(problem, *problem.pairs)


def _grid(problem: Problem) -> Iterator[_Tile]:
    """Stretches of x against stretches of y; f is kept as [y set, vector of x], g as [x set, vector of y]."""
    xo, yo = problem.x.offsets.numpy(), problem.y.offsets.numpy()
    for i in range(0, len(xo) - 1, STRIP_SETS):
        i_end = min(i + STRIP_SETS, len(xo) - 1)
        p, width = np.diff(xo[i : i_end + 1]), int(xo[i_end] - xo[i])
        j = 0
        while j < len(yo) - 1:
            fits = np.searchsorted(yo, yo[j] + max(1, TILE_SCORES // width), side="right") - 1
            j_end = int(min(max(j + 1, fits), len(yo) - 1))
            t, k = np.diff(yo[j : j_end + 1]), (i_end - i) * (j_end - j)
            x_at, y_at = np.repeat(xo[i:i_end], j_end - j), np.tile(yo[j:j_end], i_end - i)
            yield _Tile(
                Each(
                    [(slice(int(xo[i]), int(xo[i_end])), slice(0, int(yo[j_end] - yo[j])))],
                    slice(int(yo[j]), int(yo[j_end])),
                ),
                where=(
                    (y_at - yo[j]) * width + (x_at - xo[i]),
                    np.full(k, width),
                    np.repeat(p, j_end - j),
                    np.tile(t, i_end - i),
                    x_at,
                    y_at,
                    np.tile(np.arange(j, j_end), i_end - i) * xo[-1] + x_at,
                    np.repeat(np.arange(i, i_end), j_end - j) * yo[-1] + y_at,
                ),
                place=(slice(i, i_end), slice(j, j_end)),
            )
            j = j_end


def _listed(problem: Problem, rows: Tensor, columns: Tensor) -> Iterator[_Tile]:
    """Pairs grouped by their x, sets of x that meet about as many vectors of y side by side; f and g in that order."""
    xo, yo = problem.x.offsets.numpy(), problem.y.offsets.numpy()
    i, j = rows.numpy(), columns.numpy()
    in_order = np.array_equal(j, np.arange(len(yo) - 1)) and bool((np.diff(i) >= 0).all())
    p, t = np.diff(xo)[i], np.diff(yo)[j]
    met = np.bincount(i, weights=t)[i]
    order = np.arange(len(i)) if in_order else np.lexsort((i, met, p))
    i, j, p, t, met = i[order], j[order], p[order], t[order], met[order]
    f_at, g_at = np.cumsum(p) - p, np.cumsum(t) - t
    start = 0
    while start < len(i):
        stop = max(start + 1, int(np.searchsorted(g_at + t, g_at[start] + GATHERED, side="right")))
        if not in_order:  # those of one size that one batched product takes, if that is more than one
            like = (p[start:stop] == p[start]) & (met[start:stop] <= (1 + PADDING) * met[start])
            stop = start + int(like.sum())
        cut = slice(start, stop)
        gemms, before = _grouped(problem, i[cut], j[cut], in_order)
        where = (before, p[cut], p[cut], t[cut], xo[i[cut]], yo[j[cut]], f_at[cut], g_at[cut])
        yield _Tile(gemms, where, torch.from_numpy(order[cut]))
        start = stop


def _grouped(problem: Problem, i: Ints, j: Ints, in_order: bool) -> tuple[Gemms, Ints]:
    """GEMMs for the pairs `x[i]` with `y[j]`, one a set of x; and where each pair's scores begin."""
    xo, yo = problem.x.offsets.numpy(), problem.y.offsets.numpy()
    p, t = np.diff(xo)[i], np.diff(yo)[j]
    local = np.cumsum(t) - t
    first = np.diff(i, prepend=-1) != 0  # where a set of x begins
    sets, begins = i[first], local[first]
    ends = np.append(begins[1:], local[-1] + t[-1])
    if in_order:
        parts = zip(xo[sets].tolist(), xo[sets + 1].tolist(), begins.tolist(), ends.tolist(), strict=True)
        each = [(slice(low, high), slice(begin, end)) for low, high, begin, end in parts]
        return Each(each, slice(int(yo[j[0]]), int(yo[j[-1] + 1]))), np.cumsum(p * t) - p * t
    y_rows = np.repeat(yo[j] - local, t) + np.arange(int(ends[-1]))
    together = Together.of(xo[sets], int(p[0]), y_rows, ends - begins)
    group = np.cumsum(first) - 1
    return together, (group * together.y_rows.shape[1] + local - begins[group]) * p


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="otcclip-transport")


def _spread(work: Any, n: int) -> None:
    """`work` on stretches of n pairs, on as many threads as torch uses (the kernels release the GIL)."""
    threads = min(torch.get_num_threads(), n // _THREAD_PAIRS)
    if threads <= 1:
        work(slice(0, n))
        return
    cuts = [n * i // threads for i in range(threads + 1)]
    list(_workers(threads).map(work, [slice(*ends) for ends in pairwise(cuts)]))
