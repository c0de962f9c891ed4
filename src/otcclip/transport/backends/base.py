"""What a backend is given and what it gives back: the one signature behind `pair_costs` and `all_costs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from otcclip.transport.problem import FeatureSets

# Below this ε the exponential of the largest cost of unit vectors underflows, with room for a sum.
STABLE_BELOW = 2.02 / 80


@dataclass(frozen=True)
class Problem:
    """Which sets meet which: pair k is `x[rows[k]]` with `y[columns[k]]`, or every x with every y.

    Attributes:
        x, y: the sets, detached; the values that carry gradients travel beside them.
        a, b: their shares of mass, packed.
        pairs: `rows [n]`, `columns [n]` int64 on the CPU, or None for the grid.
    """

    x: FeatureSets
    y: FeatureSets
    a: Tensor
    b: Tensor
    pairs: tuple[Tensor, Tensor] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the answer: `[n]`, or `[n, m]` for the grid."""
        return (len(self.x), len(self.y)) if self.pairs is None else (len(self.pairs[0]),)


@dataclass(frozen=True)
class Settings:
    """How to solve. `mass` is what is transported, 1 unless the caller leaves some unmatched."""

    epsilon: float
    iterations: int
    tolerance: float | None = None
    sharp: bool = False
    mass: float = 1.0
    gemm_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Solved:
    """Value, iterations done and L1 error of the marginals, in the problem's shape; and what `pull` needs."""

    value: Tensor
    iterations: Tensor
    error: Tensor
    saved: Any


class Backend(Protocol):
    """`solve` gives the values; `pull` the gradients of Σ grad·value in the vectors of x and of y; `half_step` a
    lower bound of the values at a fraction of the time."""

    def solve(self, x: Tensor, y: Tensor, problem: Problem, how: Settings, keep: bool) -> Solved:
        """Values `x [X, d]`, `y [Y, d]`, packed as the problem says; `keep` if `pull` will follow."""
        ...

    def pull(
        self, x: Tensor, y: Tensor, problem: Problem, how: Settings, saved: Any, grad: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients `[X, d]`, `[Y, d]`, None where not needed; `saved` is from `solve`."""
        ...

    def half_step(self, x: Tensor, y: Tensor, problem: Problem, how: Settings) -> Tensor:
        """The dual value after the first half of an iteration, Σ_i a_i f_i with f_i = −ε log Σ_j b_j exp(−C_ij/ε)."""
        ...
