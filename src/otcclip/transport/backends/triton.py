"""Transport on a GPU in float32: one program a pair, from its vectors to its value, nothing in between in memory.

A program makes its p × t scores by tiles of the vectors' dimension, holds them in registers, exponentiates and
iterates there, and writes the value (and, for a backward pass, p + t potentials). The gradient's GEMMs are torch's.
Below the ε where exp(−C/ε) may underflow the iterations run in logarithms: on a GPU exponentials are cheap.

Held to the torch backend under Triton's interpreter (`TRITON_INTERPRET=1`); never timed, for want of a GPU here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="misc, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from otcclip.transport.backends import torch as portable
from otcclip.transport.backends.base import STABLE_BELOW, Problem, Settings, Solved
from otcclip.transport.tiles import strips

# Depth of a tile of the vectors' dimension.
_DEPTH = 32


@dataclass(frozen=True)
class _Potentials:
    """f and g over ε of every pair, `[pairs, P]` and `[pairs, T]`."""

    f: Tensor
    g: Tensor


@triton.jit
def _log_sum(exponent, axis: tl.constexpr):
    most = tl.max(exponent, axis)
    return most + tl.log(tl.sum(tl.exp(exponent - tl.expand_dims(most, axis)), axis))


@triton.jit
def _solve(
    x, y, a, b, x_at, y_at, p_of, t_of, value, count, error, f_out, g_out,
    dim, epsilon, iterations, tolerance,
    P: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    STABLE: tl.constexpr, SHARP: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    rows, columns = tl.arange(0, P), tl.arange(0, T)
    in_p, in_t = rows < tl.load(p_of + k), columns < tl.load(t_of + k)
    x_rows, y_rows = tl.load(x_at + k) + rows, tl.load(y_at + k) + columns
    scores = tl.zeros((P, T), tl.float32)
    for start in range(0, dim, D):
        depth = start + tl.arange(0, D)
        inside = depth < dim
        left = tl.load(x + x_rows[:, None] * dim + depth[None, :], mask=in_p[:, None] & inside[None, :], other=0.0)
        right = tl.load(y + y_rows[None, :] * dim + depth[:, None], mask=in_t[None, :] & inside[:, None], other=0.0)
        scores += tl.dot(left, right, input_precision="ieee")
    row_mass, column_mass = tl.load(a + x_rows, mask=in_p, other=0.0), tl.load(b + y_rows, mask=in_t, other=0.0)
    log_a = tl.where(row_mass > 0, tl.log(tl.maximum(row_mass, 1e-37)), -1e30)
    log_b = tl.where(column_mass > 0, tl.log(tl.maximum(column_mass, 1e-37)), -1e30)
    exponent = tl.where(in_p[:, None] & in_t[None, :], (scores - 1) / epsilon, -1e30)
    done, off = 0, 1e30
    if STABLE:
        g = tl.zeros((T,), tl.float32)
        f_next = -_log_sum(exponent + log_b[None, :], 1)
        f = f_next
        while (done < iterations) & (off > tolerance):
            f = f_next
            g = -_log_sum(exponent + (f + log_a)[:, None], 0)
            f_next = -_log_sum(exponent + (g + log_b)[None, :], 1)
            off = tl.sum(tl.where(row_mass > 0, row_mass * tl.abs(tl.exp(f - f_next) - 1), 0.0), 0)
            done += 1
    else:
        kernel = tl.where(in_p[:, None] & in_t[None, :], tl.exp(exponent), 0.0)
        # The sums over padding alone are 0: 1 in their place keeps them out of divisions and logarithms.
        w_next = tl.where(in_p, tl.sum(kernel * column_mass[None, :], 1), 1.0)
        w = w_next
        z = tl.full((T,), 1.0, tl.float32)
        while (done < iterations) & (off > tolerance):
            w = w_next
            z = tl.where(in_t, tl.sum(kernel * (row_mass / w)[:, None], 0), 1.0)
            w_next = tl.where(in_p, tl.sum(kernel * (column_mass / z)[None, :], 1), 1.0)
            off = tl.sum(row_mass * tl.abs(w_next / w - 1), 0)
            done += 1
        f, g = -tl.log(w), -tl.log(z)
    if SHARP:
        plan = tl.exp(exponent + (f + log_a)[:, None] + (g + log_b)[None, :])
        answer = tl.sum(tl.sum(plan * (1 - scores), 1), 0)
    else:
        paid = tl.sum(tl.where(row_mass > 0, row_mass * f, 0.0), 0)
        answer = epsilon * (paid + tl.sum(tl.where(column_mass > 0, column_mass * g, 0.0), 0))
    tl.store(value + k, answer)
    tl.store(count + k, done)
    tl.store(error + k, off)
    if KEEP:
        # Padding is read again as a vector of weight 0.
        tl.store(f_out + k * P + rows, tl.where(row_mass > 0, f + log_a, -1e30))
        tl.store(g_out + k * T + columns, tl.where(column_mass > 0, g + log_b, -1e30))


def solve(x: Tensor, y: Tensor, problem: Problem, how: Settings, keep: bool) -> Solved:
    """See `Backend.solve`. Partial transport and a reduced `gemm_dtype` are left to torch."""
    if how.mass < 1 or how.gemm_dtype is not None:
        return portable.solve(x, y, problem, how, keep)
    x, y, device = x.detach().contiguous(), y.detach().contiguous(), x.device
    i, j = _index(problem)
    p, t = problem.x.sizes[i], problem.y.sizes[j]
    # A dot needs 16 rows and columns.
    blocks = [max(16, triton.next_power_of_2(int(sizes.max()))) for sizes in (p, t)]
    where = [part.to(device) for part in (problem.x.offsets[i], problem.y.offsets[j], p, t)]
    value, error = torch.empty(len(i), device=device), torch.empty(len(i), device=device)
    count = torch.empty(len(i), dtype=torch.int64, device=device)
    kept = _Potentials(*(torch.empty(len(i) if keep else 0, size, device=device) for size in blocks))
    if len(i):
        _solve[(len(i),)](
            x, y, problem.a, problem.b, *where, value, count, error, kept.f, kept.g,
            x.shape[1], how.epsilon, how.iterations, -1.0 if how.tolerance is None else how.tolerance,
            P=blocks[0], T=blocks[1], D=_DEPTH,
            STABLE=how.epsilon < STABLE_BELOW, SHARP=how.sharp, KEEP=keep,
            num_warps=4 if blocks[0] * blocks[1] <= 4096 else 8,
        )  # fmt: skip
    shape = problem.shape
    return Solved(value.view(shape), count.view(shape), error.view(shape), kept)


def pull(
    x: Tensor, y: Tensor, problem: Problem, how: Settings, saved: Any, grad: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """See `Backend.pull`: torch's tiles, with the potentials that the kernel kept."""
    if isinstance(saved, _Potentials):
        saved = portable.Saved(*zip(*_tiled(problem, how, saved), strict=True))
    return portable.pull(x, y, problem, how, saved, grad, need)


def half_step(x: Tensor, y: Tensor, problem: Problem, how: Settings) -> Tensor:
    """See `Backend.half_step`; by torch, which does a GEMM and a pass of exponentials as well as anybody."""
    return portable.half_step(x, y, problem, how)


def _index(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.pairs is not None:
        return problem.pairs
    n, m = problem.shape
    return torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)


def _tiled(problem: Problem, how: Settings, kept: _Potentials) -> Iterator[tuple[Any, list[portable.Tile]]]:
    for strip in strips(problem):
        tiles = []
        for block in strip.ys:
            pair = strip.x.sets if strip.paired else (strip.x.sets[:, None] * problem.shape[1] + block.sets).flatten()
            f, g = kept.f[pair, : strip.x.rows.shape[1]], kept.g[pair, : block.rows.shape[1]]
            tiles.append(portable.Tile(f - 1 / how.epsilon, g))
        yield strip, tiles
