"""A backend's values and gradients as one autograd function.

The dual is stationary in f and g at its maximum, so dOT_ε/dC = P (envelope theorem; Feydy et al. 2019, §3):
nothing has to be unrolled. The value reported is the dual at the current iterate, whose derivative in C at
fixed potentials is exactly the plan of that iterate. The sharp value has another derivative: see
`backends.torch.sharp_slope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from otcclip.transport.backends import Backend, Problem, Settings


def full_precision(values: Tensor) -> torch.autocast:
    """Off with autocast: it would round the costs to bfloat16 behind the caller's `gemm_dtype`."""
    return torch.autocast(values.device.type, enabled=False)


class TransportCost(torch.autograd.Function):
    """(x values, y values, problem, settings, backend) → value, iterations, marginal error."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, problem: Problem, how: Settings, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(x):
            found = backend.solve(x, y, problem, how, any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(x, y)
        ctx.problem, ctx.how, ctx.backend, ctx.saved = problem, how, backend, found.saved
        ctx.mark_non_differentiable(found.iterations, found.error)
        return found.value, found.iterations, found.error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y = ctx.saved_tensors
        with full_precision(x):
            grads = ctx.backend.pull(x, y, ctx.problem, ctx.how, ctx.saved, grad, ctx.needs_input_grad[:2])
        return *grads, None, None, None
