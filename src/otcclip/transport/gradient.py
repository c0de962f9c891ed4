"""The entropic value as an autograd function with the envelope gradient.

The dual is stationary in f and g at its maximum, so dOT_ε/dC = P (envelope theorem; Feydy et al. 2019, §3):
nothing has to be unrolled. The value reported is the dual at the current iterate, whose derivative in C at
fixed potentials is exactly the plan of that iterate. What is kept for the backward pass is the potentials, p
+ t numbers a pair; scores and plan are computed again, tile by tile, and never all stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from otcclip.transport import sinkhorn
from otcclip.transport.tiles import Block, Strip, as_batch, scores


@dataclass(frozen=True)
class Settings:
    """How to solve; `shape` is the answer's, `[n]` or `[n, m]`."""

    shape: tuple[int, ...]
    epsilon: float
    iterations: int
    tolerance: float | None
    sharp: bool
    gemm_dtype: torch.dtype | None


@dataclass(frozen=True)
class Saved:
    """A tile's potentials over ε, with the marginals' logarithms folded in: P = exp(S/ε + rows + columns)."""

    rows: Tensor
    columns: Tensor


def full_precision(values: Tensor) -> torch.autocast:
    """Off with autocast: it would round the costs to bfloat16 behind the caller's `gemm_dtype`."""
    return torch.autocast(values.device.type, enabled=False)


def place(out: Tensor, value: Tensor, strip: Strip, y: Block) -> None:
    """Write a tile's answers `[B]` where they belong in `out`, `[n]` or `[n, m]`."""
    if strip.paired:
        out[strip.x.sets] = value
    else:
        out[strip.x.sets[:, None], y.sets] = value.view(len(strip.x.sets), len(y.sets))


class EntropicCost(torch.autograd.Function):
    """(x values, y values, strips, settings) → value, iterations, L1 row error."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, strips: Sequence[Strip], how: Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, error = x.new_empty(how.shape), x.new_empty(how.shape)
        iterations = torch.empty(how.shape, dtype=torch.int64, device=x.device)
        keep = any(ctx.needs_input_grad[:2])
        saved: list[list[Saved]] = []
        with full_precision(x):
            for strip in strips:
                saved.append([])
                x_kpd = x[strip.x.rows]
                for block in strip.ys:
                    a, b = strip.weights(block)
                    s = as_batch(scores(x_kpd, y[block.rows], strip.paired, how.gemm_dtype))
                    found = sinkhorn.solve(s, a, b, how.epsilon, how.iterations, how.tolerance)
                    if how.sharp:
                        costs = (sinkhorn.plan_of(s, found, a, b, how.epsilon) * (1 - s)).sum((1, 2))
                    else:
                        costs = sinkhorn.dual_value(found, a, b)
                    place(value, costs, strip, block)
                    place(error, found.error, strip, block)
                    place(iterations, found.iterations, strip, block)
                    if keep:
                        rows = (found.f - 1) / how.epsilon + a.log()
                        saved[-1].append(Saved(rows, found.g / how.epsilon + b.log()))
        ctx.save_for_backward(x, y)
        ctx.strips, ctx.saved, ctx.how = strips, saved, how
        ctx.mark_non_differentiable(iterations, error)
        return value, iterations, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad[:2]
        grad_x, grad_y = (torch.zeros_like(x) if need_x else None), (torch.zeros_like(y) if need_y else None)
        with full_precision(x):
            for strip, tiles in zip(ctx.strips, ctx.saved, strict=True):
                x_kpd = x[strip.x.rows]
                into_x = torch.zeros_like(x_kpd)
                for block, saved in zip(strip.ys, tiles, strict=True):
                    y_jtd = y[block.rows]
                    pull = _pull(x_kpd, y_jtd, strip, block, saved, grad, ctx.how)
                    if need_x:
                        into_x += _times(pull, y_jtd, x_kpd.shape, ctx.how.gemm_dtype)
                    if grad_y is not None:
                        into_y = _times(pull.transpose(-1, -2), x_kpd, y_jtd.shape, ctx.how.gemm_dtype)
                        grad_y.index_add_(0, block.rows.flatten(), into_y.flatten(0, 1))
                if grad_x is not None:
                    grad_x.index_add_(0, strip.x.rows.flatten(), into_x.flatten(0, 1))
        return grad_x, grad_y, None, None


def _pull(x: Tensor, y: Tensor, strip: Strip, block: Block, saved: Saved, grad: Tensor, how: Settings) -> Tensor:
    """−(upstream gradient)·P, since C = 1 − S: `[k, p, t]` if paired, else one matrix `[k·p, j·t]`."""
    s = scores(x, y, strip.paired, how.gemm_dtype)
    if strip.paired:
        exponent = s.div_(how.epsilon).add_(saved.rows[:, :, None] + saved.columns[:, None])
        return exponent.exp_().mul_(-grad[strip.x.sets][:, None, None])
    k, p, j, t = s.shape
    rows, columns = saved.rows.view(k, j, p, 1).transpose(1, 2), saved.columns.view(k, 1, j, t)
    upstream = grad[strip.x.sets[:, None], block.sets][:, None, :, None]
    plan = s.div_(how.epsilon).add_(rows).add_(columns).exp_()
    return plan.mul_(-upstream).view(k * p, j * t)


def _times(pull: Tensor, values: Tensor, shape: torch.Size, gemm_dtype: torch.dtype | None) -> Tensor:
    """`pull @ values`, shaped as the gradient's side of the tile."""
    dtype = values.dtype
    if pull.ndim == 2:
        values = values.flatten(0, 1)
    if gemm_dtype is not None:
        pull, values = pull.to(gemm_dtype), values.to(gemm_dtype)
    return torch.matmul(pull, values).to(dtype).view(shape)
