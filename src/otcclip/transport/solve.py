"""Transport costs between feature sets: set i with set i (`pair_costs`), every set with every set
(`all_costs`).

C = 1 − V Tᵀ, OT_ε(V, T) = min_P ⟨P, C⟩ + ε KL(P ‖ abᵀ) with the sets' weights as marginals, equal ones unless
given (METHOD §1; Cuturi 2013). Two rankings:

- `"entropic"`: the dual value at the last iterate. A lower bound of OT_ε, rising with iterations; its
  gradient is the plan (envelope theorem), so the backward pass costs three GEMMs and one exponential, no
  iterations.
- `"sharp"`: ⟨P, C⟩ at the last iterate. Its gradient is *not* the plan but the solution of one linear system
  a pair (implicit differentiation), right at convergence.

With `unmatched = u`, partial transport: only 1 − u of the mass moves, no vector sends more than its share, and
KL is taken to (1 − u) abᵀ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from otcclip.transport import sinkhorn, tiles
from otcclip.transport.backends import Name, Problem, Settings, choose
from otcclip.transport.gradient import TransportCost, full_precision
from otcclip.transport.problem import FeatureSets

Ranking = Literal["entropic", "sharp"]
Backend = Name

# L1 error of the marginals at which a pair counts as converged when the caller sets no tolerance.
CONVERGED = 1e-3


@dataclass(frozen=True)
class PairCosts:
    """Costs of `n` pairs.

    `marginal_error` is the L1 error of the plan's row sums, its column sums being exact; in partial transport what
    rows and columns send beyond their share, or short of it where they are held to it, the total being exact.
    """

    value: Float[Tensor, " n"]
    iterations: Int64[Tensor, " n"]
    marginal_error: Float[Tensor, " n"]
    converged: Bool[Tensor, " n"]


@dataclass(frozen=True)
class AllCosts:
    """Costs of every set of x with every set of y; fields as in `PairCosts`."""

    value: Float[Tensor, "n m"]
    iterations: Int64[Tensor, "n m"]
    marginal_error: Float[Tensor, "n m"]
    converged: Bool[Tensor, "n m"]


def pair_costs(
    x: FeatureSets,
    y: FeatureSets,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    tolerance: float | None = None,
    ranking: Ranking = "entropic",
    backend: Backend = "auto",
    unmatched: float = 0.0,
    pairs: tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]] | None = None,
    gemm_dtype: torch.dtype | None = None,
    validate: bool = True,
) -> PairCosts:
    """Transport cost of x[i] to y[i], or of the `pairs` named; differentiable in the values of both.

    Args:
        x, y: sets of unit vectors of one dimension, on one device, with their weights. float64 is solved in
            float64, any other dtype in float32.
        epsilon: entropic regularisation, in units of cost (cosine distance); supported from .005 up.
        iterations: Sinkhorn iterations, the most if `tolerance` is set.
        tolerance: stop a pair once its marginal error is within this: torch looks every 5 iterations, numba
            after each and, from the 8th on, accelerates the iteration (Anderson).
        ranking: `"entropic"` (its gradient is the plan) or `"sharp"` (⟨P, C⟩, implicit gradient).
        backend: `"torch"`; `"numba"` (CPU, float32); `"triton"` (CUDA, float32); `"auto"` picks by device and
            dtype among those installed.
        unmatched: the mass to leave unmatched, in [0, 1).
        pairs: pair k is `x[pairs[0][k]]` with `y[pairs[1][k]]`; dearer to say by `take`, which copies the sets.
        gemm_dtype: dtype of the GEMMs that make the scores and gather the gradients. bfloat16 halves their
            time and moves a score by up to .006.
        validate: check that all vectors are finite and of unit norm, one pass over each side.

    Returns:
        `PairCosts`: `.value [n]` in units of cost; `.converged` compares with `tolerance`, or 1e-3 if it is
        None.

    Raises:
        ValueError: sets, options or their combination are not usable; the message names the argument.
        UserError: the backend's package is not installed.
    """
    how = settings(epsilon, iterations, tolerance, ranking, unmatched, gemm_dtype)
    check_operands(x, y, "x", "y", validate)
    return PairCosts(*_costs(x, y, _index(x, y, pairs), how, backend))


def all_costs(
    x: FeatureSets,
    y: FeatureSets,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    tolerance: float | None = None,
    ranking: Ranking = "entropic",
    backend: Backend = "auto",
    unmatched: float = 0.0,
    gemm_dtype: torch.dtype | None = None,
    validate: bool = True,
) -> AllCosts:
    """Transport cost of every set of x to every set of y, `[n, m]`; differentiable in the values of both.

    Arguments, errors and source as in `pair_costs`.
    Beyond the inputs and the answer, memory is one tile, and with a gradient (p + t) numbers a pair for the
    backward pass.
    """
    how = settings(epsilon, iterations, tolerance, ranking, unmatched, gemm_dtype)
    check_operands(x, y, "x", "y", validate)
    return AllCosts(*_costs(x, y, None, how, backend))


@torch.no_grad()
def half_step(
    x: FeatureSets,
    y: FeatureSets,
    *,
    epsilon: float,
    backend: Backend = "auto",
    pairs: tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]] | None = None,
    gemm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Lower bounds of what `all_costs` (or `pair_costs` of `pairs`) gives as entropic value at any count of iterations.

    The dual value after the first half of an iteration: one GEMM and one exponential a cell, no iterations. Nothing is
    validated. Values already in `gemm_dtype` are used as they are.
    """
    dtype = solved_in(x, y)
    problem = Problem(x, y, x.shares(dtype), y.shares(dtype), pairs)
    how = Settings(epsilon, 1, gemm_dtype=gemm_dtype)
    left, right = (sets.values.detach().to(gemm_dtype or dtype) for sets in (x, y))
    return choose(backend, x.values.device, dtype).half_step(left, right, problem, how)


def plan(
    x: FeatureSets,
    y: FeatureSets,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    unmatched: float = 0.0,
    validate: bool = True,
) -> list[Float[Tensor, "p t"]]:
    """The transport plan of each pair x[i], y[i]: `n` tensors `[p_i, t_i]` of mass 1 − unmatched, detached.

    Row r of a plan says where patch r's mass goes, column c which patches pay for token c's; times p, a column
    drawn over the image's cells is that token's heat map. Column sums are exact, row sums to `marginal_error`.
    Arguments and errors as in `pair_costs`.
    """
    how = settings(epsilon, iterations, None, "entropic", unmatched, None)
    check_operands(x, y, "x", "y", validate)
    index = _index(x, y, None)
    x, y = promote(x, y)
    plans: list[Tensor] = [x.values] * len(x)
    p, t = x.sizes.tolist(), y.sizes.tolist()
    with torch.no_grad(), full_precision(x.values):
        for strip in tiles.strips(Problem(x, y, x.shares(), y.shares(), index)):
            block = strip.ys[0]
            a, b = strip.weights(block)
            s = tiles.scores(x.values[strip.x.rows], y.values[block.rows], True, None)
            found = sinkhorn.solve(s, a, b, how.epsilon, how.iterations, mass=how.mass)
            batch = sinkhorn.plan_of(s, found, a, b, how.epsilon)
            for i, matrix in zip(strip.x.sets.tolist(), batch, strict=True):
                plans[i] = matrix[: p[i], : t[i]].clone()
    return plans


def promote(x: FeatureSets, y: FeatureSets) -> tuple[FeatureSets, FeatureSets]:
    """Both in the dtype that is solved in."""
    dtype = solved_in(x, y)
    return x.to(dtype), y.to(dtype)


def solved_in(x: FeatureSets, y: FeatureSets) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (x.values.dtype, y.values.dtype) else torch.float32


def settings(
    epsilon: float,
    iterations: int,
    tolerance: float | None = None,
    ranking: str = "entropic",
    unmatched: float = 0.0,
    gemm_dtype: torch.dtype | None = None,
) -> Settings:
    """Options as a backend takes them, or ValueError for one out of range."""
    if ranking not in ("entropic", "sharp"):
        raise ValueError(f"ranking: expected 'entropic' or 'sharp', got {ranking!r}")
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon: expected a finite number > 0, got {epsilon!r}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected None or a number > 0, got {tolerance!r}")
    if not 0 <= unmatched < 1:
        raise ValueError(f"unmatched: expected a share of mass in [0, 1), got {unmatched!r}")
    return Settings(float(epsilon), iterations, tolerance, ranking == "sharp", 1.0 - unmatched, gemm_dtype)


def check_operands(x: FeatureSets, y: FeatureSets, x_name: str, y_name: str, validate: bool) -> None:
    """Raise ValueError unless x and y can be compared; the content is read only if `validate`."""
    if x.dim != y.dim:
        raise ValueError(f"{y_name}: expected vectors of dim {x.dim} as in {x_name}, got {y.dim}")
    if x.values.device != y.values.device:
        raise ValueError(f"{y_name}: expected device {x.values.device} as in {x_name}, got {y.values.device}")
    if validate:
        x.validate(x_name)
        y.validate(y_name)


def _index(x: FeatureSets, y: FeatureSets, pairs: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The pairs asked for, on the host."""
    if pairs is None:
        if len(x) != len(y):
            raise ValueError(f"y: expected {len(x)} sets as in x, got {len(y)}")
        return torch.arange(len(x)), torch.arange(len(x))
    index = tuple(torch.as_tensor(side).to("cpu", torch.int64) for side in pairs)
    if len(index) != 2 or any(side.ndim != 1 or len(side) != len(index[0]) for side in index):
        raise ValueError(f"pairs: expected two [n] tensors of indices, got {[list(side.shape) for side in index]}")
    for side, sets, name in zip(index, (x, y), "xy", strict=True):
        if len(side) and not 0 <= int(side.min()) <= int(side.max()) < len(sets):
            ends = f"{int(side.min())} to {int(side.max())}"
            raise ValueError(f"pairs: expected indices of {name} in [0, {len(sets)}), got {ends}")
    return index[0], index[1]


def _costs(
    x: FeatureSets, y: FeatureSets, pairs: tuple[Tensor, Tensor] | None, how: Settings, backend: str
) -> tuple[Tensor, ...]:
    x, y = promote(x, y)
    solver = choose(backend, x.values.device, x.values.dtype)
    if how.sharp and how.mass < 1 and torch.is_grad_enabled() and (x.values.requires_grad or y.values.requires_grad):
        raise ValueError("unmatched: expected 0 with ranking='sharp' and a gradient; use 'entropic' or detach the sets")
    problem = Problem(x.detach(), y.detach(), x.shares(), y.shares(), pairs)
    value, iterations, error = TransportCost.apply(x.values, y.values, problem, how, solver)
    converged = error <= (CONVERGED if how.tolerance is None else how.tolerance)
    return value, iterations, error, converged
