"""Transport costs between feature sets: set i with set i (`pair_costs`), every set with every set
(`all_costs`).

C = 1 − V Tᵀ with uniform marginals, OT_ε(V, T) = min_P ⟨P, C⟩ + ε KL(P ‖ abᵀ) (METHOD §1; Cuturi 2013).
Two rankings:

- `"entropic"`: the dual value at the last iterate. A lower bound of OT_ε, rising with iterations; its
  gradient is the plan (envelope theorem), so the backward pass costs three GEMMs and one exponential, no
  iterations.
- `"sharp"`: ⟨P, C⟩ at the last iterate. Its gradient is *not* the plan; here it is unrolled by autograd in
  log form, a tile at a time, which is right and slow.

`all_costs` over 256 × 256 sets, 36 cells × up to 32 tokens (mean 12), d = 128, one EPYC thread, float32 GEMM
(`benchmarks/transport.py`, busy machine): .54 s forward and .39 s backward at 10 iterations, .89 s and .37 s
at 20; a bfloat16 GEMM takes .1 s off the two. Iterations, not GEMMs, are what a faster backend would save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otcclip.transport import sinkhorn, tiles
from otcclip.transport.gradient import EntropicCost, Settings, full_precision, place
from otcclip.transport.problem import FeatureSets

Ranking = Literal["entropic", "sharp"]
Backend = Literal["auto", "torch", "numba", "triton"]

BUILT_BACKENDS = ("torch",)
PLANNED_BACKENDS = ("numba", "triton")
# L1 error of the row sums at which a pair counts as converged when the caller sets no tolerance.
CONVERGED = 1e-3


@dataclass(frozen=True)
class PairCosts:
    """Costs of `n` pairs. `marginal_error` is the L1 error of the plan's row sums; column sums are exact."""

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
    gemm_dtype: torch.dtype | None = None,
    validate: bool = True,
) -> PairCosts:
    """Transport cost of x[i] to y[i], for every i; differentiable in the values of both.

    Args:
        x, y: `n` sets each of unit vectors of one dimension, on one device. float64 is solved in float64, any
            other dtype in float32.
        epsilon: entropic regularisation, in units of cost (cosine distance); supported from .005 up.
        iterations: Sinkhorn iterations, the most if `tolerance` is set.
        tolerance: stop a pair once the L1 error of its plan's row sums is within this (looked at every 5
            iterations).
        ranking: `"entropic"` (its gradient is the plan) or `"sharp"` (⟨P, C⟩, gradient unrolled).
        backend: `"auto"` or `"torch"`.
        gemm_dtype: dtype of the GEMMs that make the scores and gather the gradients. bfloat16 halves their
            time and moves a score by up to .006.
        validate: check that all vectors are finite and of unit norm, one pass over each side.

    Returns:
        `PairCosts`: `.value [n]` in units of cost; `.converged` compares with `tolerance`, or 1e-3 if it is
        None.

    Raises:
        ValueError: sets, options or their combination are not usable; the message names the argument.
        NotImplementedError: a backend that is not built; `tolerance` with a gradient through `"sharp"`.
    """
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} sets as in x, got {len(y)}")
    how = _settings(x, y, (len(x),), epsilon, iterations, tolerance, ranking, backend, gemm_dtype, validate)
    x, y = promote(x, y)
    return PairCosts(*_costs(list(tiles.pairs(x, y)), x.values, y.values, how))


def all_costs(
    x: FeatureSets,
    y: FeatureSets,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    tolerance: float | None = None,
    ranking: Ranking = "entropic",
    backend: Backend = "auto",
    gemm_dtype: torch.dtype | None = None,
    validate: bool = True,
) -> AllCosts:
    """Transport cost of every set of x to every set of y, `[n, m]`; differentiable in the values of both.

    Arguments, errors and source as in `pair_costs`, without its condition that x and y be equally many.
    Beyond the inputs and the answer, memory is one tile, and with a gradient (p + t) numbers a pair for the
    backward pass.
    """
    shape = (len(x), len(y))
    how = _settings(x, y, shape, epsilon, iterations, tolerance, ranking, backend, gemm_dtype, validate)
    x, y = promote(x, y)
    return AllCosts(*_costs(list(tiles.grid(x, y)), x.values, y.values, how))


def plan(
    x: FeatureSets, y: FeatureSets, *, epsilon: float = 0.1, iterations: int = 20, validate: bool = True
) -> list[Float[Tensor, "p t"]]:
    """The transport plan of each pair x[i], y[i]: `n` tensors `[p_i, t_i]` of mass 1, detached.

    Row r of a plan says where patch r's mass 1/p goes, column c which patches pay for token c's 1/t; times p,
    a column drawn over the image's cells is that token's heat map. Column sums are exact, row sums to
    `marginal_error`. Arguments and errors as in `pair_costs`.
    """
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} sets as in x, got {len(y)}")
    how = _settings(x, y, (len(x),), epsilon, iterations, None, "entropic", "auto", None, validate)
    x, y = promote(x, y)
    plans: list[Tensor] = [x.values] * len(x)
    p, t = x.sizes.tolist(), y.sizes.tolist()
    with torch.no_grad(), full_precision(x.values):
        for strip in tiles.pairs(x, y):
            block = strip.ys[0]
            a, b = strip.weights(block)
            s = tiles.scores(x.values[strip.x.rows], y.values[block.rows], True, None)
            found = sinkhorn.solve(s, a, b, how.epsilon, how.iterations)
            batch = sinkhorn.plan_of(s, found, a, b, how.epsilon)
            for i, matrix in zip(strip.x.sets.tolist(), batch, strict=True):
                plans[i] = matrix[: p[i], : t[i]].clone()
    return plans


def promote(x: FeatureSets, y: FeatureSets) -> tuple[FeatureSets, FeatureSets]:
    """Both in the dtype that is solved in: float64 if either is, else float32."""
    dtype = torch.float64 if torch.float64 in (x.values.dtype, y.values.dtype) else torch.float32
    return x.to(dtype), y.to(dtype)


def check_options(epsilon: float, iterations: int, tolerance: float | None) -> None:
    """Raise ValueError for an option out of range."""
    if not (isinstance(epsilon, int | float) and math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon: expected a finite number > 0, got {epsilon!r}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected None or a number > 0, got {tolerance!r}")


def check_operands(x: FeatureSets, y: FeatureSets, x_name: str, y_name: str, validate: bool) -> None:
    """Raise ValueError unless x and y can be compared; the content is read only if `validate`."""
    if x.dim != y.dim:
        raise ValueError(f"{y_name}: expected vectors of dim {x.dim} as in {x_name}, got {y.dim}")
    if x.values.device != y.values.device:
        raise ValueError(f"{y_name}: expected device {x.values.device} as in {x_name}, got {y.values.device}")
    if validate:
        x.validate(x_name)
        y.validate(y_name)


def _settings(
    x: FeatureSets,
    y: FeatureSets,
    shape: tuple[int, ...],
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    ranking: str,
    backend: str,
    gemm_dtype: torch.dtype | None,
    validate: bool,
) -> Settings:
    if ranking not in ("entropic", "sharp"):
        raise ValueError(f"ranking: expected 'entropic' or 'sharp', got {ranking!r}")
    if backend in PLANNED_BACKENDS:
        raise NotImplementedError(f"backend: {backend!r} is not built; available: {', '.join(BUILT_BACKENDS)}")
    if backend != "auto" and backend not in BUILT_BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BUILT_BACKENDS)}, got {backend!r}")
    check_options(epsilon, iterations, tolerance)
    check_operands(x, y, "x", "y", validate)
    return Settings(shape, float(epsilon), iterations, tolerance, ranking == "sharp", gemm_dtype)


def _costs(strips: list[tiles.Strip], x: Tensor, y: Tensor, how: Settings) -> tuple[Tensor, ...]:
    if how.sharp and torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        value, iterations, error = _unrolled(strips, x, y, how)
    else:
        value, iterations, error = EntropicCost.apply(x, y, strips, how)
    converged = error <= (CONVERGED if how.tolerance is None else how.tolerance)
    return value, iterations, error, converged


def _unrolled(strips: list[tiles.Strip], x: Tensor, y: Tensor, how: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The sharp value on the autograd graph; a tile is recomputed in the backward pass, so one is held."""
    if how.tolerance is not None:
        raise NotImplementedError("tolerance: not built for a gradient through ranking='sharp'; pass None")

    def tile(x_kpd: Tensor, y_jtd: Tensor, a: Tensor, b: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
        s = tiles.as_batch(tiles.scores(x_kpd, y_jtd, paired, how.gemm_dtype))
        found = sinkhorn.solve_unrolled(s, a, b, how.epsilon, how.iterations)
        return (sinkhorn.plan_of(s, found, a, b, how.epsilon) * (1 - s)).sum((1, 2)), found.error

    value, error = x.new_empty(how.shape), x.new_empty(how.shape)
    with full_precision(x):
        for strip in strips:
            for block in strip.ys:
                ab = strip.weights(block)
                costs, errors = checkpoint(tile, x[strip.x.rows], y[block.rows], *ab, strip.paired, use_reentrant=False)
                place(value, costs, strip, block)
                place(error, errors, strip, block)
    return value, torch.full(how.shape, how.iterations, device=x.device), error
