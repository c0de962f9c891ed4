"""Sinkhorn on a list of pairs, one pair at a time from exponential to value: the loops behind `backends.numba`.

Inner functions are compiled into the three entries at the end, and only those are cached on disk. numba checks
a cached function against its own file alone, so the entries close over a digest of every source they are
made from.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
# (numba infers the types of its functions)

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numba import njit

from otcclip.transport.backends import anderson, kernels, simd
from otcclip.transport.backends.kernels import LANES, ROWS, absorb, copy, dot, inside, jit, row_error, sweep
from otcclip.transport.backends.simd import div, exp, load, log, splat, spread, store, sub, total

# Plain iterations before acceleration: most pairs are done by then, and the linear model begins to hold.
PATIENCE = 8


@jit
def _scale(kernel, blocks, rows, state, steps, tolerance, bounded, slow):
    """Up to `steps` iterations from `acc` = K v; fills `w_done`, `z_done` → how many, error, out of range?

    With a tolerance, stops at it, and is accelerated from the `PATIENCE`-th iteration on. `state`: the marginals
    a and b, then λ, the next w, w, z and v as in `kernels`, then w and z of the last iterate that was in range.
    """
    a, b, lam, acc, w, z, v, w_done, z_done = state
    width = blocks * LANES
    ell, image, memory, gram, right, theta = slow
    done, seen, error, before = 0, 0, np.float32(np.inf), np.float32(np.inf)
    while done < steps:
        if tolerance > 0 and done >= PATIENCE and error <= 2 * before:
            for q in range(0, width, LANES):
                store(image, q, sub(splat(np.float32(0.0)), log(load(acc, q))))
                if seen == 0:
                    store(ell, q, sub(splat(np.float32(0.0)), log(load(w, q))))
            anderson.accelerate(ell, image, a, width, seen, memory, gram, right, theta)
            seen += 1
            for q in range(0, width, LANES):
                store(acc, q, exp(sub(splat(np.float32(0.0)), load(ell, q))))
        else:
            seen = 0
        if bounded and not inside(acc, width):
            return done, error, True
        for q in range(0, width, LANES):
            value = load(acc, q)
            store(w, q, value)
            store(lam, q, div(load(a, q), value))
        sweep(kernel, blocks, rows, lam, acc, z, v, b)
        if bounded:
            if not inside(z, rows):
                return done, error, True
            copy(w_done, w, width)
            copy(z_done, z, rows)
        done += 1
        if tolerance > 0:
            before = min(before, error)
            error = row_error(lam, acc, a, width)
            if error <= tolerance:
                break
    if not bounded:
        copy(w_done, w, width)
        copy(z_done, z, rows)
    return done, error, False


@jit
def _stable(matrix, exponents, blocks, rows, state, phi, gamma, steps, tolerance, slow):
    """`_scale` where exp(−C/ε) may underflow; leaves the plan in `matrix` and factors of one → how many, error."""
    a, b, lam, acc, _, _, v, w_done, z_done = state
    width, tall = blocks * LANES, len(z_done)
    _fill(phi, width, np.float32(0.0))
    _fill(gamma, tall, np.float32(0.0))
    done, far = 0, True
    while far and done < steps:
        kernels.log_step(exponents, blocks, rows, a, b, phi, gamma)
        done += 1
        kernels.absorbed(matrix, exponents, blocks, rows, phi, gamma)
        kernels.start(matrix, blocks, rows, b, acc)
        _fill(w_done, width, np.float32(1.0))
        _fill(z_done, tall, np.float32(1.0))
        if tolerance > 0 and row_error(a, acc, a, width) <= tolerance:
            break
        n, _, far = _scale(matrix, blocks, rows, state, steps - done, tolerance, True, slow)
        absorb(phi, w_done, width)
        absorb(gamma, z_done, tall)
        done += n
    kernels.absorbed(matrix, exponents, blocks, rows, phi, gamma)
    kernels.start(matrix, blocks, rows, b, acc)
    copy(lam, a, width)
    copy(v, b, tall)
    return done, row_error(a, acc, a, width)


@jit
def _up(n, unit):
    return (n + unit - 1) // unit * unit


@jit
def _fill(x, width, value):
    for q in range(0, width, LANES):
        store(x, q, splat(value))


@jit
def _gather(x, source, at, n, width):
    """x[:n] from `source[at:]`, zeros up to `width`."""
    for i in range(n):
        x[i] = source[at + i]
    for i in range(n, width):
        x[i] = np.float32(0.0)


@jit
def _scatter(target, at, x, n):
    for i in range(n):
        target[at + i] = x[i]


@jit
def _solve(s, where, shares, how, work, out):
    at, ld, p, t, a_at, b_at, f_at, g_at = where
    a, b = shares
    epsilon, iterations, tolerance, stable, sharp, keep = how
    value, count, error, f, g = out
    inverse, half = np.float32(1.0 / epsilon), len(work) // 2
    most_p, most_t = _up(p.max(), LANES), _up(t.max(), LANES)
    x = np.zeros((6, most_p), np.float32)
    y = np.zeros((5, most_t), np.float32)
    memory = np.zeros((anderson.VECTORS + 2) * most_p, np.float32)
    gram = np.zeros((anderson.WINDOW, anderson.WINDOW))
    right, theta = np.zeros(anderson.WINDOW), np.zeros(anderson.WINDOW)
    slow = (memory[:most_p], memory[most_p : 2 * most_p], memory[2 * most_p :], gram, right, theta)
    matrix, exponents = work[:half], work[half:]
    for k in range(len(at)):
        width, tall = _up(p[k], LANES), _up(t[k], LANES)
        blocks, rows = width // LANES, _up(t[k], ROWS)
        ax, lam, acc, w, w_done, phi = x[0], x[1], x[2], x[3], x[4], x[5]
        by, z, v, z_done, gamma = y[0, :tall], y[1, :tall], y[2, :tall], y[3, :tall], y[4, :tall]
        _fill(z, tall, np.float32(1.0))
        _gather(ax, a, a_at[k], p[k], width)
        _gather(by, b, b_at[k], t[k], tall)
        state = (ax, by, lam, acc, w, z, v, w_done, z_done)
        if stable:
            kernels.exponents(exponents, s, at[k], ld[k], t[k], blocks, inverse)
            kernels.double(exponents, rows, blocks, ax, by)
            count[k], error[k] = _stable(
                matrix, exponents, blocks, rows, state, phi, gamma, iterations, tolerance, slow
            )
        else:
            kernels.scaling_kernel(matrix, s, at[k], ld[k], p[k], t[k], rows, blocks, inverse)
            kernels.start(matrix, blocks, rows, by, acc)
            count[k], _, _ = _scale(matrix, blocks, rows, state, iterations, tolerance, False, slow)
            error[k] = row_error(lam, acc, ax, width)
            _fill(phi, width, np.float32(0.0))
            _fill(gamma, tall, np.float32(0.0))
            absorb(phi, w_done, width)
            absorb(gamma, z_done, tall)
        if sharp:
            value[k] = kernels.sharp(matrix, s, at[k], ld[k], t[k], blocks, lam, v)
        else:
            value[k] = epsilon * (dot(ax, phi, width) + dot(by, gamma, tall))
        if keep:
            _scatter(f, f_at[k], phi, p[k])
            _scatter(g, g_at[k], gamma, t[k])


@jit
def _pull(s, where, shares, epsilon, potentials, gradient):
    at, ld, p, t, a_at, b_at, f_at, g_at = where
    a, b = shares
    f, g = potentials
    inverse, one = splat(np.float32(1.0 / epsilon)), splat(np.float32(1.0))
    most = _up(p.max(), LANES)
    phi, ax, row = np.zeros(most, np.float32), np.zeros(most, np.float32), np.zeros(most, np.float32)
    for k in range(len(at)):
        n = p[k]
        whole = n // LANES * LANES
        _gather(phi, f, f_at[k], n, n)
        _gather(ax, a, a_at[k], n, n)
        for r in range(t[k]):
            start = at[k] + r * ld[k]
            shift = splat(g[g_at[k] + r])
            factor = splat(np.float32(-gradient[k]) * b[b_at[k] + r])
            for q in range(0, _up(n, LANES), LANES):
                exponent = simd.fma(sub(load(s, start + q), one), inverse, simd.add(load(phi, q), shift))
                plan = simd.mul(simd.mul(exp(exponent), load(ax, q)), factor)
                if q < whole:
                    store(s, start + q, plan)
                else:
                    store(row, 0, plan)
                    for i in range(n - whole):
                        s[start + whole + i] = row[i]


@jit
def _half_step(s, where, shares, epsilon, value):
    # What `scaling_kernel` and `start` do, in one pass: no kernel is stored, for none is read again.
    at, ld, p, t, a_at, b_at, _, _ = where
    a, b = shares
    one, inverse = splat(np.float32(1.0)), splat(np.float32(1.0 / epsilon))
    tail = np.zeros(LANES, np.float32)
    for k in range(len(at)):
        whole = p[k] // LANES * LANES
        f = splat(np.float32(0.0))
        for q in range(0, p[k], LANES):
            mass = splat(np.float32(0.0))
            for r in range(t[k]):
                score = load(s, at[k] + r * ld[k] + q)
                mass = simd.fma(exp(simd.mul(sub(score, one), inverse)), spread(b, b_at[k] + r), mass)
            if q < whole:
                f = simd.fma(log(mass), load(a, a_at[k] + q), f)
            else:  # lanes past p hold what lies beside, with no weight
                _gather(tail, a, a_at[k] + q, p[k] - q, LANES)
                f = simd.fma(log(mass), load(tail, 0), f)
        value[k] = -epsilon * total(f)


def _entries(digest):
    """The three compiled entries, cached under `digest`."""
    cached = njit(cache=True, nogil=True, error_model="numpy")

    @cached
    def solve_pairs(s, where, shares, how, work, out):
        """Sinkhorn for a list of pairs, whose scores are `s[at + r·ld + i]`, i along x and r along y.

        `where`: at, ld, p, t, then where each pair's a, b, f and g begin, all int64 `[k]`. `shares`: a, b. `how`:
        epsilon, iterations, tolerance (0: none), stable, sharp, keep. `out`: value, count, error `[k]`, and f
        and g over ε, filled if `keep`. `s` needs 16 finite floats past its end; `work` is scratch of twice the
        largest padded kernel.
        """
        if digest:
            _solve(s, where, shares, how, work, out)

    @cached
    def pull_pairs(s, where, shares, epsilon, potentials, gradient):
        """−gradient·P of every pair, in place of its scores."""
        if digest:
            _pull(s, where, shares, epsilon, potentials, gradient)

    @cached
    def half_step_pairs(s, where, shares, epsilon, value):
        """The dual value of every pair after half an iteration: x's potential, y's at zero."""
        if digest:
            _half_step(s, where, shares, epsilon, value)

    return solve_pairs, pull_pairs, half_step_pairs


def _digest() -> int:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(source.read_bytes() for source in sources)) or 1


solve_pairs, pull_pairs, half_step_pairs = _entries(_digest())
