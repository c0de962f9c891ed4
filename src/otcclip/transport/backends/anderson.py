"""Anderson acceleration of Sinkhorn's slow tail, on the logarithm ℓ of x's scaling factors.

Sinkhorn is a fixed point ℓ = G(ℓ) whose steps shrink by a constant factor, near 1 for the very pairs that a
search is after (well matched sets have nearly one-to-one plans). From the last few differences of inputs and
residuals r = G(ℓ) − ℓ, the next input is the combination whose residual is least in a linear model (Walker &
Ni 2011, algorithm AA with a window of 5). Any ℓ is a feasible dual point, so what an accelerated step can
cost is time: the caller goes back to plain steps if the error rises.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
# (numba infers the types of its functions)

from __future__ import annotations

from typing import Any

import numpy as np

from otcclip.transport.backends import kernels, simd
from otcclip.transport.backends.simd import fma, load, splat, store, sub

WINDOW = 5
LANES = simd.LANES
# Vectors of width 16·blocks that `accelerate` keeps: r and G(ℓ) of the step before, and the two histories.
VECTORS = 2 + 2 * WINDOW
_jit: Any = kernels.jit


@_jit
def _dot(x, x_at, y, y_at, weights, width):
    products = splat(np.float32(0.0))
    for q in range(0, width, LANES):
        weighted = simd.mul(load(x, x_at + q), load(weights, q))
        products = fma(weighted, load(y, y_at + q), products)
    return float(simd.total(products))


@_jit
def _least_squares(gram, right, n, theta):
    """θ = (gram + small·I)⁻¹ right by Cholesky, in place of `gram`; False if it is not positive."""
    trace = 0.0
    for i in range(n):
        trace += gram[i, i]
    for i in range(n):
        for j in range(i + 1):
            value = gram[i, j]
            if i == j:
                value += 1e-7 * trace
            for m in range(j):
                value -= gram[i, m] * gram[j, m]
            if i == j:
                if not value > 0.0:
                    return False
                gram[i, i] = np.sqrt(value)
            else:
                gram[i, j] = value / gram[j, j]
    for i in range(n):
        value = right[i]
        for m in range(i):
            value -= gram[i, m] * theta[m]
        theta[i] = value / gram[i, i]
    for i in range(n - 1, -1, -1):
        value = theta[i]
        for m in range(i + 1, n):
            value -= gram[m, i] * theta[m]
        theta[i] = value / gram[i, i]
    return True


@_jit
def accelerate(ell, image, weights, width, seen, memory, gram, right, theta):
    """ℓ ← the next input, from ℓ and its image G(ℓ) `[width]`; `seen` images came before this one.

    `memory` holds `VECTORS` vectors: residual and image of the step before, then `WINDOW` differences of each.
    """
    slot = (seen - 1) % WINDOW
    dr, dg = (2 + slot) * width, (2 + WINDOW + slot) * width
    for q in range(0, width, LANES):
        g = load(image, q)
        r = sub(g, load(ell, q))
        if seen > 0:
            store(memory, dr + q, sub(r, load(memory, q)))
            store(memory, dg + q, sub(g, load(memory, width + q)))
        store(memory, q, r)
        store(memory, width + q, g)
        store(ell, q, g)
    n = min(seen, WINDOW)
    for i in range(n):
        right[i] = _dot(memory, (2 + i) * width, memory, 0, weights, width)
        for j in range(i + 1):
            gram[i, j] = _dot(memory, (2 + i) * width, memory, (2 + j) * width, weights, width)
    if n == 0 or not _least_squares(gram, right, n, theta):
        return
    for q in range(0, width, LANES):
        value = load(ell, q)
        for i in range(n):
            value = fma(splat(np.float32(-theta[i])), load(memory, (2 + WINDOW + i) * width + q), value)
        store(ell, q, value)
