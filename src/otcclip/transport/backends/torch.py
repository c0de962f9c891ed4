"""Transport in plain torch: any device, float32 or float64; the other backends are held to it.

Tiles of padded pairs (`tiles`), each one GEMM and one batched Sinkhorn (`sinkhorn`). For the backward pass the
potentials are kept, p + t numbers a pair; scores and plan are computed again, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.transport import sinkhorn
from otcclip.transport.backends.base import Problem, Settings, Solved
from otcclip.transport.tiles import Block, Strip, as_batch, scores, strips


@dataclass(frozen=True)
class Tile:
    """Potentials over ε, with the marginals' logarithms folded in: P = exp(S/ε + rows + columns)."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Saved:
    strips: Sequence[Strip]
    tiles: Sequence[Sequence[Tile]]


def solve(x: Tensor, y: Tensor, problem: Problem, how: Settings, keep: bool) -> Solved:
    """See `Backend.solve`."""
    value, error = x.new_empty(problem.shape), x.new_empty(problem.shape)
    iterations = torch.empty(problem.shape, dtype=torch.int64, device=x.device)
    kept: list[Strip] = []
    saved: list[list[Tile]] = []
    for strip in strips(problem):
        tiles: list[Tile] = []
        x_kpd = x[strip.x.rows]
        for block in strip.ys:
            a, b = strip.weights(block)
            s = as_batch(scores(x_kpd, y[block.rows], strip.paired, how.gemm_dtype))
            found = sinkhorn.solve(s, a, b, how.epsilon, how.iterations, how.tolerance, how.mass)
            if how.sharp:
                costs = (sinkhorn.plan_of(s, found, a, b, how.epsilon) * (1 - s)).sum((1, 2))
            else:
                costs = sinkhorn.dual_value(found, a, b)
            _place(value, costs, strip, block)
            _place(error, found.error, strip, block)
            _place(iterations, found.iterations, strip, block)
            if keep:
                tiles.append(Tile((found.f - 1) / how.epsilon + a.log(), found.g / how.epsilon + b.log()))
        if keep:
            kept.append(strip)
            saved.append(tiles)
    return Solved(value, iterations, error, Saved(kept, saved))


def pull(
    x: Tensor, y: Tensor, problem: Problem, how: Settings, saved: Saved, grad: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """See `Backend.pull`."""
    grad_x, grad_y = (torch.zeros_like(v) if needed else None for v, needed in zip((x, y), need, strict=True))
    for strip, tiles in zip(saved.strips, saved.tiles, strict=True):
        x_kpd = x[strip.x.rows]
        into_x = torch.zeros_like(x_kpd)
        for block, tile in zip(strip.ys, tiles, strict=True):
            y_jtd = y[block.rows]
            pulled = _pull(x_kpd, y_jtd, strip, block, tile, grad, how)
            if grad_x is not None:
                into_x += _times(pulled, y_jtd, x_kpd.shape, how.gemm_dtype)
            if grad_y is not None:
                into_y = _times(pulled.transpose(-1, -2), x_kpd, y_jtd.shape, how.gemm_dtype)
                grad_y.index_add_(0, block.rows.flatten(), into_y.flatten(0, 1))
        if grad_x is not None:
            grad_x.index_add_(0, strip.x.rows.flatten(), into_x.flatten(0, 1))
    return grad_x, grad_y


def half_step(x: Tensor, y: Tensor, problem: Problem, how: Settings) -> Tensor:
    """See `Backend.half_step`."""
    value = torch.empty(problem.shape, dtype=problem.a.dtype, device=x.device)
    for strip in strips(problem):
        x_kpd = x[strip.x.rows]
        for block in strip.ys:
            a, b = strip.weights(block)
            s = as_batch(scores(x_kpd, y[block.rows], strip.paired, how.gemm_dtype)).to(value.dtype)
            f = -how.epsilon * torch.logsumexp((s - 1) / how.epsilon + b.log()[:, None], dim=2)
            _place(value, (a * f).sum(1), strip, block)
    return value


def _place(out: Tensor, value: Tensor, strip: Strip, y: Block) -> None:
    """Write a tile's answers `[B]` where they belong in `out`, `[n]` or `[n, m]`."""
    if strip.paired:
        out[strip.x.sets] = value
    else:
        out[strip.x.sets[:, None], y.sets] = value.view(len(strip.x.sets), len(y.sets))


def _pull(x: Tensor, y: Tensor, strip: Strip, block: Block, tile: Tile, grad: Tensor, how: Settings) -> Tensor:
    """−(upstream gradient)·dV/dC, since C = 1 − S: `[k, p, t]` if paired, else one matrix `[k·p, j·t]`."""
    s = scores(x, y, strip.paired, how.gemm_dtype)
    if how.sharp:
        s = as_batch(s)
        plan = (s / how.epsilon + tile.rows[:, :, None] + tile.columns[:, None]).exp()
        upstream = grad[strip.x.sets] if strip.paired else grad[strip.x.sets[:, None], block.sets].flatten()
        pulled = sharp_slope(plan, 1 - s, how.epsilon).mul_(-upstream[:, None, None])
        if strip.paired:
            return pulled
        (k, p), (j, t) = x.shape[:2], y.shape[:2]
        return pulled.view(k, j, p, t).transpose(1, 2).reshape(k * p, j * t)
    if strip.paired:
        exponent = s.div_(how.epsilon).add_(tile.rows[:, :, None] + tile.columns[:, None])
        return exponent.exp_().mul_(-grad[strip.x.sets][:, None, None])
    k, p, j, t = s.shape
    rows, columns = tile.rows.view(k, j, p, 1).transpose(1, 2), tile.columns.view(k, 1, j, t)
    upstream = grad[strip.x.sets[:, None], block.sets][:, None, :, None]
    plan = s.div_(how.epsilon).add_(rows).add_(columns).exp_()
    return plan.mul_(-upstream).view(k * p, j * t)


def sharp_slope(plan: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """d⟨P, C⟩/dC `[B, p, t]` at the converged plan: P·(1 + (α_i + β_j − C)/ε).

    α and β solve the optimality conditions' adjoint, [diag r, P; Pᵀ, diag c] [α; β] = [(P∘C) 1; (P∘C)ᵀ 1], with r
    and c the plan's own marginals; eliminating α leaves its t × t Schur complement (Luise et al. 2018 solve the same
    system), singular only along the constant, which c cᵀ fills.
    """
    # The system is as badly conditioned as Sinkhorn is slow: float64, whatever the plan's dtype.
    p, c = plan.double(), cost.double()
    weighted = p * c
    rows, columns = p.sum(2), p.sum(1)
    inverse = torch.where(rows > 0, 1 / rows, 0.0)
    right_x, right_y = weighted.sum(2), weighted.sum(1)
    scaled = p.transpose(1, 2) * inverse[:, None]  # Pᵀ diag(1/r)
    schur = torch.diag_embed(columns + (columns == 0)) - scaled @ p + columns[:, :, None] * columns[:, None]
    beta = torch.linalg.solve(schur, right_y - (scaled @ right_x[..., None])[..., 0])
    alpha = inverse * (right_x - (p @ beta[..., None])[..., 0])
    slope: Tensor = p * (1 + (alpha[:, :, None] + beta[:, None] - c) / epsilon)
    return slope.to(plan.dtype)


def _times(pulled: Tensor, values: Tensor, shape: torch.Size, gemm_dtype: torch.dtype | None) -> Tensor:
    """`pulled @ values`, shaped as the gradient's side of the tile."""
    dtype = values.dtype
    if pulled.ndim == 2:
        values = values.flatten(0, 1)
    if gemm_dtype is not None:
        pulled, values = pulled.to(gemm_dtype), values.to(gemm_dtype)
    return torch.matmul(pulled, values).to(dtype).view(shape)
