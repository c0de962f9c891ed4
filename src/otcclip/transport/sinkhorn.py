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

import math
from dataclasses import dataclass
from typing import Protocol

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
    """An iterate: `f [B, p]`, `g [B, t]` in units of cost; iterations and L1 error of the row sums `[B]`.

    `offset [B]` is what ⟨a, f⟩ + ⟨b, g⟩ lacks of the dual value, in partial transport; else None.
    """

    f: Tensor
    g: Tensor
    iterations: Tensor
    error: Tensor
    offset: Tensor | None = None


class _Stepper(Protocol):
    def advance(self, steps: int) -> None: ...
    def potentials(self) -> tuple[Tensor, Tensor]: ...
    def error(self) -> Tensor: ...
    def offset(self) -> Tensor | None: ...
    def keep(self, index: Tensor) -> None: ...


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

    def offset(self) -> None:
        return None

    def keep(self, index: Tensor) -> None:
        names = ("a", "b", "kernel", "kernel_t", "w", "z", "next_w")
        for name in names if self.row is None else (*names, "row", "column"):
            setattr(self, name, getattr(self, name)[index])


class _Log:
    """The same iterates as f/ε, g/ε."""

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

    def offset(self) -> None:
        return None

    def keep(self, index: Tensor) -> None:
        for name in ("a", "log_a", "log_b", "exponent", "f", "g", "next_f"):
            setattr(self, name, getattr(self, name)[index])


class _Capped:
    """Partial transport, in logarithms: f ≤ 0 and g ≤ 0 (nobody sends more than its share), and a multiplier ℓ.

    P = a b e^{(f + g + ℓ − C)/ε}; each update is the dual's maximiser in f, g or ℓ given the others, the last one
    making the mass exact (Benamou et al. 2015, §5, as ascent on the dual). With m transported, KL is taken to m·abᵀ.
    """

    def __init__(self, scores: Tensor, a: Tensor, b: Tensor, epsilon: float, mass: float) -> None:
        self.epsilon, self.mass, self.a, self.b = epsilon, mass, a, b
        self.exponent = (scores - 1) / epsilon + a.log()[:, :, None] + b.log()[:, None, :]
        self.f, self.g = torch.zeros_like(a), torch.zeros_like(b)
        self.level = a.new_full((len(a),), math.log(mass))

    def advance(self, steps: int) -> None:
        log_a, log_b = self.a.log(), self.b.log()
        for _ in range(steps):
            # A row of weight 0 has the exponent −∞ throughout: its potential is free, and 0 will do.
            rows = torch.logsumexp(self.exponent + self.g[:, None], 2) - log_a + self.level[:, None]
            self.f = (-rows).clamp(max=0).nan_to_num(nan=0.0)
            columns = torch.logsumexp(self.exponent + self.f[:, :, None], 1)
            self.g = (log_b - columns - self.level[:, None]).clamp(max=0).nan_to_num(nan=0.0)
            self.level = math.log(self.mass) - torch.logsumexp(columns + self.g, 1)

    def potentials(self) -> tuple[Tensor, Tensor]:
        """ℓ goes with f: the plan is then written as in the balanced problem."""
        return (self.f + self.level[:, None]) * self.epsilon, self.g * self.epsilon

    def offset(self) -> Tensor:
        return -self.epsilon * ((1 - self.mass) * self.level + self.mass * math.log(self.mass))

    def error(self) -> Tensor:
        plan = (self.exponent + (self.f + self.level[:, None])[:, :, None] + self.g[:, None]).exp()
        rows, columns = plan.sum(2) - self.a, plan.sum(1) - self.b
        # Where the potential is 0 less than the share may be sent; where it is not, exactly the share.
        rows = torch.where(self.f < 0, rows.abs(), rows.clamp(min=0))
        columns = torch.where(self.g < 0, columns.abs(), columns.clamp(min=0))
        return rows.sum(1) + columns.sum(1)

    def keep(self, index: Tensor) -> None:
        for name in ("a", "b", "exponent", "f", "g", "level"):
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
    scores: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    iterations: int,
    tolerance: float | None = None,
    mass: float = 1.0,
) -> Potentials:
    """Sinkhorn potentials of every pair: `scores [B, p, t]`, `a [B, p]`, `b [B, t]`, float32 or float64.

    With `tolerance`, a pair stops at the first look (every 5 iterations) where its L1 row error is within it;
    each pair decides for itself, so its answer does not depend on its neighbours in the batch.
    """
    if mass < 1:
        return _run(_Capped(scores, a, b, epsilon, mass), iterations, tolerance)
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


def _run(stepper: _Stepper, iterations: int, tolerance: float | None) -> Potentials:
    if tolerance is None:
        stepper.advance(iterations)
        f, g = stepper.potentials()
        error = stepper.error()
        return Potentials(f, g, torch.full_like(error, iterations, dtype=torch.int64), error, stepper.offset())
    done = 0
    active: Tensor | None = None  # None: every pair is still in the stepper
    result: Potentials | None = None
    while True:
        steps = min(_CHECK_EVERY, iterations - done)
        stepper.advance(steps)
        done += steps
        (f, g), error, offset = stepper.potentials(), stepper.error(), stepper.offset()
        if result is None or active is None:
            active = torch.arange(len(error), device=error.device)
            result = Potentials(f.clone(), g.clone(), torch.full_like(active, done), error.clone(), offset)
        else:
            result.f[active], result.g[active] = f, g
            if result.offset is not None and offset is not None:
                result.offset[active] = offset
            result.iterations[active], result.error[active] = done, error
        left = (error > tolerance).nonzero()[:, 0]
        if done >= iterations or not len(left):
            return result
        if len(left) < len(active):
            stepper.keep(left)
            active = active[left]


def dual_value(potentials: Potentials, a: Tensor, b: Tensor) -> Tensor:
    """⟨a, f⟩ + ⟨b, g⟩ `[B]`: the whole dual, as the plan's mass is exact at an iterate's end; never above OT_ε."""
    value = (a * potentials.f).sum(-1) + (b * potentials.g).sum(-1)
    return value if potentials.offset is None else value + potentials.offset


def plan_of(scores: Tensor, potentials: Potentials, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j − C_ij)/ε), `[B, p, t]`."""
    rows = (potentials.f - 1) / epsilon + a.log()
    columns = potentials.g / epsilon + b.log()
    return (scores / epsilon + (rows[:, :, None] + columns[:, None])).exp()
