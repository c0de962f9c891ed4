"""Sinkhorn's iteration on a batch of score matrices: the mathematics, with no idea what the vectors mean.

Given scores S = V Tᵀ `[B, p, t]`, costs C = 1 − S and marginals a `[B, p]`, b `[B, t]`, entropic transport is

    OT_ε = min_P ⟨P, C⟩ + ε KL(P ‖ a bᵀ)
         = max_{f,g} ⟨a, f⟩ + ⟨b, g⟩ − ε (Σ_ij a_i b_j e^{(f_i + g_j − C_ij)/ε} − 1)

(Cuturi 2013; Peyré & Cuturi 2019, §4). One iteration updates f, then g, each the exact maximiser given the
other, starting from g = 0; so the dual value rises with every iteration and bounds OT_ε from below, and after
g's update the plan's column sums are exact and its mass is 1.

Two forms of the same iterates. *Scaling*: two matrix–vector products an iteration on exp(−C/ε). *Log*: two
log-sum-exps; slow, but right where K would underflow. A pair takes the log form only if max C/ε passes
`_MAX_EXPONENT` even after subtracting row then column minima from C.

Padding has weight zero and repeats a real vector (see `FeatureSets.rows`), so row and column minima, sums and
logarithms are finite everywhere and no mask appears below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The exponent range that stays in normal floats, with room for a sum and a reciprocal.
_MAX_EXPONENT = {torch.float32: 80.0, torch.float64: 600.0}
# Scores of unit vectors lie in [-1, 1], give or take the tolerated rounding of their norms.
_MAX_COST = 2.02
# Iterations between two looks at the marginals when a tolerance is set: a look costs a host synchronisation.
_CHECK_EVERY = 5


@dataclass(frozen=True)
class Potentials:
    """An iterate: `f [B, p]`, `g [B, t]` in units of cost; iterations and L1 error of the row sums `[B]`."""

    f: Tensor
    g: Tensor
    iterations: Tensor
    error: Tensor


class _Scaling:
    """u = a / (K v), v = b / (Kᵀ u) on `scores − shifts`; `row`, `column` are the minima taken out of C."""

    def __init__(self, scores: Tensor, a: Tensor, b: Tensor, epsilon: float, reduction: _Reduction | None) -> None:
        self.epsilon, self.a, self.b = epsilon, a[:, None], b[:, None]
        self.row: Tensor | None = None
        if reduction is None:
            # One pass each for the shift and the exponential, both in place on our own copy.
            self.kernel = (scores - 1).mul_(1 / epsilon).exp_()
            v = self.b
        else:
            self.row, self.column = reduction.row[:, None], reduction.column[:, None]
            self.kernel = reduction.cost.mul(-1 / epsilon).exp_()
            # The start is g = 0 whatever the shift. A start that underflows belongs to a column that no row's
            # first sum would have felt: in every row some column has shift 0 and kernel 1.
            v = self.b * torch.exp(-self.column / epsilon)
        # A row vector times a matrix runs along contiguous memory; matrix times column takes four times as
        # long on a CPU. Hence a transposed copy.
        self.kernel_t = self.kernel.transpose(1, 2).contiguous()
        self.next_w = torch.bmm(v, self.kernel_t)
        self.w = self.z = self.next_w

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.w = self.next_w
            self.z = torch.bmm(self.a / self.w, self.kernel)
            self.next_w = torch.bmm(self.b / self.z, self.kernel_t)

    def potentials(self) -> tuple[Tensor, Tensor]:
        f, g = self.w.log().mul_(-self.epsilon), self.z.log().mul_(-self.epsilon)
        if self.row is not None:
            f, g = f + self.row, g + self.column
        return f[:, 0], g[:, 0]

    def error(self) -> Tensor:
        return (self.a * (self.next_w / self.w - 1)).abs().sum((1, 2))

    def keep(self, index: Tensor) -> None:
        names = ("a", "b", "kernel", "kernel_t", "w", "z", "next_w")
        for name in names if self.row is None else (*names, "row", "column"):
            setattr(self, name, getattr(self, name)[index])


class _Log:
    """The same iterates as f/ε, g/ε; differentiable by autograd, which the sharp ranking's gradient uses."""

    def __init__(self, scores: Tensor, a: Tensor, b: Tensor, epsilon: float) -> None:
        self.epsilon, self.a = epsilon, a
        self.log_a, self.log_b = a.log()[:, :, None], b.log()[:, None, :]
        self.exponent = (scores - 1) / epsilon
        self.g = torch.zeros_like(b)
        self.next_f = self._rows()
        self.f = self.next_f

    def _rows(self) -> Tensor:
        return -torch.logsumexp(self.exponent + (self.g[:, None] + self.log_b), 2)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.f = self.next_f
            self.g = -torch.logsumexp(self.exponent + (self.f[:, :, None] + self.log_a), 1)
            self.next_f = self._rows()

    def potentials(self) -> tuple[Tensor, Tensor]:
        return self.f * self.epsilon, self.g * self.epsilon

    def error(self) -> Tensor:
        return (self.a * torch.expm1(self.f - self.next_f)).abs().sum(1)

    def keep(self, index: Tensor) -> None:
        for name in ("a", "log_a", "log_b", "exponent", "f", "g", "next_f"):
            setattr(self, name, getattr(self, name)[index])


@dataclass(frozen=True)
class _Reduction:
    """C less its row minima, then its column minima: every row and every column of `cost` holds a zero."""

    cost: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of(cls, scores: Tensor) -> _Reduction:
        cost = 1 - scores
        row = cost.amin(2)
        cost = cost - row[:, :, None]
        column = cost.amin(1)
        return cls(cost - column[:, None], row, column)

    def take(self, index: Tensor) -> _Reduction:
        return _Reduction(self.cost[index], self.row[index], self.column[index])


def solve(
    scores: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int, tolerance: float | None = None
) -> Potentials:
    """Sinkhorn potentials of every pair: `scores [B, p, t]`, `a [B, p]`, `b [B, t]`, float32 or float64.

    With `tolerance`, a pair stops at the first look (every 5 iterations) where its L1 row error is within it;
    each pair decides for itself, so its answer does not depend on its neighbours in the batch.
    """
    limit = _MAX_EXPONENT[scores.dtype]
    if epsilon * limit >= _MAX_COST:
        return _run(_Scaling(scores, a, b, epsilon, None), iterations, tolerance)
    reduction = _Reduction.of(scores)
    safe = reduction.cost.amax((1, 2)) <= limit * epsilon
    if bool(safe.all()):
        return _run(_Scaling(scores, a, b, epsilon, reduction), iterations, tolerance)
    yes, no = safe.nonzero()[:, 0], (~safe).nonzero()[:, 0]
    slow = _run(_Log(scores[no], a[no], b[no], epsilon), iterations, tolerance)
    if not len(yes):
        return slow
    fast = _run(_Scaling(scores[yes], a[yes], b[yes], epsilon, reduction.take(yes)), iterations, tolerance)
    back = torch.cat([yes, no]).argsort()
    names = ("f", "g", "iterations", "error")
    return Potentials(*(torch.cat([getattr(fast, name), getattr(slow, name)])[back] for name in names))


def solve_unrolled(scores: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int) -> Potentials:
    """`solve` in log form only, with every iteration on the autograd graph."""
    return _run(_Log(scores, a, b, epsilon), iterations, None)


def _run(stepper: _Scaling | _Log, iterations: int, tolerance: float | None) -> Potentials:
    if tolerance is None:
        stepper.advance(iterations)
        f, g = stepper.potentials()
        error = stepper.error().detach()
        return Potentials(f, g, torch.full_like(error, iterations, dtype=torch.int64), error)
    done = 0
    active: Tensor | None = None  # None: every pair is still in the stepper
    result: Potentials | None = None
    while True:
        steps = min(_CHECK_EVERY, iterations - done)
        stepper.advance(steps)
        done += steps
        (f, g), error = stepper.potentials(), stepper.error()
        if result is None or active is None:
            active = torch.arange(len(error), device=error.device)
            result = Potentials(f.clone(), g.clone(), torch.full_like(active, done), error.clone())
        else:
            result.f[active], result.g[active] = f, g
            result.iterations[active], result.error[active] = done, error
        left = (error > tolerance).nonzero()[:, 0]
        if done >= iterations or not len(left):
            return result
        if len(left) < len(active):
            stepper.keep(left)
            active = active[left]


def dual_value(potentials: Potentials, a: Tensor, b: Tensor) -> Tensor:
    """⟨a, f⟩ + ⟨b, g⟩ `[B]`: the whole dual, as the plan has mass 1 after g's update; never above OT_ε."""
    return (a * potentials.f).sum(-1) + (b * potentials.g).sum(-1)


def plan_of(scores: Tensor, potentials: Potentials, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε), `[B, p, t]`."""
    rows = (potentials.f - 1) / epsilon + a.log()
    columns = potentials.g / epsilon + b.log()
    return (scores / epsilon + (rows[:, :, None] + columns[:, None])).exp()
