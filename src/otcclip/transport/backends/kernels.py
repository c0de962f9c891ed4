"""What one iteration on one pair is made of, its kernel matrix in the core's cache (`pairs` puts it together).

Of the two sets of a pair, x (patches) lies along the lanes, padded to a multiple of 16, and y (tokens) along
the rows, padded to a multiple of 4. Padding has weight 0 and kernel 1, so no sum is zero and no mask is
needed. One iteration (x's potential, then y's, as in `sinkhorn`) is one sweep over the rows: with λ = a / w,

    z_r = ⟨K_r, λ⟩,   v_r = b_r / z_r,   w' = Σ_r v_r K_r

so a row serves its sum and the next iteration's w while it is in registers.

Where exp(−C/ε) may underflow (`stable`), the first iteration runs in logarithms and the kernel is exp((f + g −
C)/ε): entries of a plan, over its marginals. Scaling goes on from there until a factor leaves [1e-13, 1e13];
then the factors are absorbed into f and g and one more iteration runs in logarithms (Schmitzer 2019, §3).
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
# (numba infers the types of its functions)

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from otcclip.transport.backends import simd
from otcclip.transport.backends.simd import (
    add,
    divide_by_totals,
    exp,
    fma,
    larger,
    load,
    log,
    mul,
    smaller,
    splat,
    spread,
    store,
    sub,
    total,
)

LANES, ROWS = simd.LANES, 4
# A scaling factor past this, or its inverse, is absorbed. A kernel entry below e^-87 is held at e^-87 (`simd.exp`);
# times two factors of 1e13 that is 1e-12 of a marginal, where two of 1e20 made it a hundred times the marginal.
_FAR, _NEAR = np.float32(1e13), np.float32(1e-13)
# No wrappers: these are called from compiled functions only, and a wrapper takes longer to compile than its function.
_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
jit: Any = njit(**_OPTIONS)


@jit
def exponents(out, s, at, ld, t, blocks, inverse):
    """(S − 1)/ε of one pair into `out [t, 16·blocks]`; lanes past p hold what lies beside."""
    one, scale = splat(np.float32(-1.0)), splat(inverse)
    for r in range(t):
        for q in range(blocks):
            score = load(s, at + r * ld + q * LANES)
            store(out, (r * blocks + q) * LANES, mul(add(score, one), scale))


@jit
def scaling_kernel(out, s, at, ld, p, t, rows, blocks, inverse):
    """exp((S − 1)/ε) of one pair into `out [rows, 16·blocks]`, with ones in the padding."""
    one, scale = splat(np.float32(-1.0)), splat(inverse)
    width = blocks * LANES
    for r in range(t):
        for q in range(0, width, LANES):
            store(out, r * width + q, exp(mul(add(load(s, at + r * ld + q), one), scale)))
    for r in range(t):
        for i in range(p, width):
            out[r * width + i] = np.float32(1.0)
    for i in range(t * width, rows * width):
        out[i] = np.float32(1.0)


@jit
def double(matrix, rows, blocks, a, b):
    """Lanes and rows of weight 0 repeat the first of positive weight: no maximum and no sum can notice them."""
    width, i0, j0 = blocks * LANES, 0, 0
    while not a[i0] > 0:
        i0 += 1
    while not b[j0] > 0:
        j0 += 1
    for r in range(rows):
        if b[r] > 0:
            for i in range(width):
                if not a[i] > 0:
                    matrix[r * width + i] = matrix[r * width + i0]
    for r in range(rows):
        if not b[r] > 0:
            for q in range(0, width, LANES):
                store(matrix, r * width + q, load(matrix, j0 * width + q))


@jit
def start(kernel, blocks, rows, b, acc):
    """w = K b: the first update of x's potential follows from y's at zero."""
    for q in range(blocks):
        w = splat(np.float32(0.0))
        for r in range(rows):
            w = fma(load(kernel, (r * blocks + q) * LANES), spread(b, r), w)
        store(acc, q * LANES, w)


@jit
def sweep(kernel, blocks, rows, lam, acc, z, v, b):
    """One iteration from λ = a / w: fills z, v and the next w (`acc`). Four rows share each load of λ and w."""
    zero = splat(np.float32(0.0))
    for q in range(blocks):
        store(acc, q * LANES, zero)
    width = blocks * LANES
    for r in range(0, rows, ROWS):
        at = r * width
        s0, s1, s2, s3 = zero, zero, zero, zero
        for q in range(0, width, LANES):
            x = load(lam, q)
            s0 = fma(load(kernel, at + q), x, s0)
            s1 = fma(load(kernel, at + width + q), x, s1)
            s2 = fma(load(kernel, at + 2 * width + q), x, s2)
            s3 = fma(load(kernel, at + 3 * width + q), x, s3)
        divide_by_totals(b, z, v, r, s0, s1, s2, s3)
        x0, x1, x2, x3 = spread(v, r), spread(v, r + 1), spread(v, r + 2), spread(v, r + 3)
        for q in range(0, width, LANES):
            w = load(acc, q)
            w = fma(load(kernel, at + q), x0, w)
            w = fma(load(kernel, at + width + q), x1, w)
            w = fma(load(kernel, at + 2 * width + q), x2, w)
            w = fma(load(kernel, at + 3 * width + q), x3, w)
            store(acc, q, w)


@jit
def inside(values, width):
    """Whether all scaling factors are in range."""
    low = high = load(values, 0)
    for q in range(LANES, width, LANES):
        value = load(values, q)
        low, high = smaller(low, value), larger(high, value)
    return simd.smallest(low) > _NEAR and simd.largest(high) < _FAR


@jit
def row_error(lam, acc, a, width):
    """Σ |row sums − a|, where the row sums of the plan are λ·w'."""
    error = splat(np.float32(0.0))
    for q in range(0, width, LANES):
        row, want = mul(load(lam, q), load(acc, q)), load(a, q)
        error = add(error, larger(sub(row, want), sub(want, row)))
    return total(error)


@jit
def copy(target, source, length):
    for q in range(0, length, LANES):
        store(target, q, load(source, q))


@jit
def log_step(exponents, blocks, rows, a, b, phi, gamma):
    """One iteration in logarithms: φ = f/ε from γ = g/ε, then γ from φ; maxima first, so nothing overflows."""
    width = blocks * LANES
    for q in range(0, width, LANES):
        most = splat(np.float32(-np.inf))
        for r in range(rows):
            most = larger(most, add(load(exponents, r * width + q), spread(gamma, r)))
        mass = splat(np.float32(0.0))
        for r in range(rows):
            value = exp(sub(add(load(exponents, r * width + q), spread(gamma, r)), most))
            mass = fma(value, spread(b, r), mass)
        store(phi, q, sub(splat(np.float32(0.0)), add(most, log(mass))))
    for r in range(rows):
        most = splat(np.float32(-np.inf))
        for q in range(0, width, LANES):
            most = larger(most, add(load(exponents, r * width + q), load(phi, q)))
        top = simd.largest(most)
        mass = splat(np.float32(0.0))
        for q in range(0, width, LANES):
            value = exp(sub(add(load(exponents, r * width + q), load(phi, q)), splat(top)))
            mass = fma(value, load(a, q), mass)
        gamma[r] = -top - np.float32(np.log(total(mass)))


@jit
def absorbed(kernel, exponents, blocks, rows, phi, gamma):
    """exp((f + g − C)/ε): the plan over its marginals."""
    width = blocks * LANES
    for r in range(rows):
        shift = spread(gamma, r)
        for q in range(0, width, LANES):
            store(kernel, r * width + q, exp(add(add(load(exponents, r * width + q), load(phi, q)), shift)))


@jit
def absorb(potential, factor, length):
    for q in range(0, length, LANES):
        store(potential, q, sub(load(potential, q), log(load(factor, q))))


@jit
def dot(x, y, width):
    products = splat(np.float32(0.0))
    for q in range(0, width, LANES):
        products = fma(load(x, q), load(y, q), products)
    return total(products)


@jit
def sharp(kernel, s, at, ld, t, blocks, lam, v):
    """⟨P, C⟩ for P = diag(λ) K diag(v)."""
    cost = np.float32(0.0)
    one, width = splat(np.float32(1.0)), blocks * LANES
    for r in range(t):
        row = splat(np.float32(0.0))
        for q in range(0, width, LANES):
            plan = mul(load(kernel, r * width + q), load(lam, q))
            row = fma(plan, sub(one, load(s, at + r * ld + q)), row)
        cost += v[r] * total(row)
    return cost
