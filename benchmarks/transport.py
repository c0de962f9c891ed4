"""Transport side by side: POT, geomloss and OTT-JAX for values, unrolled autograd for gradients.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/transport.py [--json]      # pip install 'otcclip[bench]'

One process, one thread, process CPU time, contenders in turn (round robin), medians. Unit vectors, synthetic
and clustered. Searches are in `transport_search.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np
import ot
import torch
from torch import Tensor

from otcclip.transport import FeatureSets, all_costs, pair_costs, sinkhorn
from otcclip.transport.backends.pairs import solve_pairs

EPSILON, ROUNDS = 0.05, 5


def features(sizes: Sequence[int], dim: int, seed: int, spread: float = 0.5) -> FeatureSets:
    """Sets scattered about one of 64 centres each, as the features of a trained tower are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(64, dim, generator=torch.Generator().manual_seed(99))
    owner = torch.repeat_interleave(torch.randint(64, (len(sizes),), generator=generator), torch.tensor(sizes))
    values = centres[owner] + spread * torch.randn(sum(sizes), dim, generator=generator)
    values = torch.nn.functional.normalize(values, dim=1)
    return FeatureSets.from_list(list(values.split(list(sizes))))


def lengths(n: int, mean: float, most: int, seed: int) -> list[int]:
    """Caption lengths: log-normal about `mean`, 2 to `most`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = mean * torch.exp(0.45 * torch.randn(n, generator=generator) - 0.1)
    return [int(t) for t in drawn.round().clamp(2, most)]


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median process seconds of each, measured in turn after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            if turn:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def chunks(n: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, n, size)]


def ours_given_scores(x: FeatureSets, y: FeatureSets, iterations: int) -> dict[str, Callable[[], object]]:
    """Both backends' solves of x[i] with y[i], their GEMMs made beforehand."""
    p, t = x.sizes.numpy(), y.sizes.numpy()
    n, at = len(p), np.cumsum(p * t) - p * t
    s = np.concatenate([(y[i] @ x[i].T).numpy().ravel() for i in range(n)] + [np.zeros(16, np.float32)])
    xo, yo = x.offsets[:-1].numpy(), y.offsets[:-1].numpy()
    where, shares = (at, p, p, t, xo, yo, xo, yo), (x.shares().numpy(), y.shares().numpy())
    out = np.empty(n, np.float32), np.empty(n, np.int64), np.empty(n, np.float32), *(np.empty(0, np.float32),) * 2
    work = torch.empty(2 * (int(p.max()) + 16) * (int(t.max()) + 16)).numpy()
    v, a = x.padded()[0], x.weighted(x.shares())
    a = FeatureSets(a.shares()[:, None], x.offsets).padded()[0][..., 0]
    b = FeatureSets(y.shares()[:, None], y.offsets).padded()[0][..., 0]
    scores = torch.bmm(v, y.padded()[0].transpose(1, 2))

    def torch_backend() -> None:
        for part in chunks(n, 64):
            found = sinkhorn.solve(scores[part], a[part], b[part], EPSILON, iterations)
            sinkhorn.dual_value(found, a[part], b[part])

    def numba_backend() -> None:
        solve_pairs(s, where, shares, (EPSILON, iterations, 0.0, False, False, False), work, out)

    return {"ours, numba": numba_backend, "ours, torch": torch_backend}


def theirs(cost: Tensor, a: Tensor, b: Tensor, iterations: int) -> dict[str, Callable[[], object]]:
    """POT, geomloss and OTT on padded costs `[n, p, t]`, in chunks of 64 as suits a cache."""
    import jax
    import jax.numpy as jnp
    from geomloss._legacy.sinkhorn_samples import softmin_tensorized
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    parts = chunks(len(cost), 64)

    def pot(method: str) -> Callable[[], object]:
        how: dict[str, Any] = {"max_iter": iterations, "tol": 0.0, "method": method, "grad": "detach"}
        return lambda: [ot.solve_batch(cost[s], EPSILON, a[s], b[s], **how) for s in parts]

    def geomloss() -> None:
        log_a, log_b = a.clamp(min=1e-30).log(), b.clamp(min=1e-30).log()
        for s in parts:
            g = torch.zeros_like(b[s])
            for _ in range(iterations):
                f = softmin_tensorized(EPSILON, cost[s], log_b[s] + g / EPSILON)
                g = softmin_tensorized(EPSILON, cost[s].transpose(1, 2), log_a[s] + f / EPSILON)

    def ott(lse: bool) -> Callable[[], object]:
        solver = Sinkhorn(
            lse_mode=lse,
            threshold=-1.0,
            inner_iterations=iterations,
            min_iterations=iterations,
            max_iterations=iterations,
        )

        def one(c: Any, u: Any, v: Any) -> Any:
            return solver(LinearProblem(Geometry(cost_matrix=c, epsilon=EPSILON), u, v)).reg_ot_cost

        solve = jax.jit(jax.vmap(one))
        given = [tuple(jnp.asarray(z[s].numpy()) for z in (cost, a, b)) for s in parts]
        return lambda: [solve(*part).block_until_ready() for part in given]

    return {
        "POT log": pot("log_sinkhorn"),
        "POT sinkhorn": pot("sinkhorn"),
        "geomloss softmin": geomloss,
        "OTT-JAX vmap, log": ott(True),
        "OTT-JAX vmap, scaling": ott(False),
    }


def cost_given(p: int, t: list[int], iterations: int, dim: int = 256) -> dict[str, float]:
    """µs a pair, costs given to everybody; padding costs whoever pads."""
    n = len(t)
    x, y = features([p] * n, dim, 1), features(t, dim, 2)
    padded, mask = y.padded()
    cost = 1 - x.values.view(n, p, dim) @ padded.transpose(1, 2)
    b = mask / mask.sum(1, keepdim=True)
    contenders = ours_given_scores(x, y, iterations) | theirs(cost, torch.full((n, p), 1 / p), b, iterations)
    return {name: 1e6 * took / n for name, took in in_turn(contenders).items()}


def doors(p: int, t: list[int], dim: int, iterations: int) -> dict[str, float]:
    """µs a pair through the doors, GEMM and bookkeeping included."""
    n = len(t)
    x, y = features([p] * n, dim, 1), features(t, dim, 2)
    few = x.take(range(16))
    how: dict[str, Any] = {"epsilon": EPSILON, "iterations": iterations, "validate": False}
    work: dict[str, Callable[[], object]] = {}
    for backend in ("numba", "torch"):
        work[f"all_costs, {backend}"] = lambda b=backend: all_costs(few, y, backend=b, **how)
        work[f"pair_costs, {backend}"] = lambda b=backend: pair_costs(x, y, backend=b, **how)
    return {name: 1e6 * took / (16 * n if "all" in name else n) for name, took in in_turn(work).items()}


def accuracy(dim: int = 64) -> dict[str, float]:
    """Worst relative distance to float64 at the same iterate, and absolute distance to converged POT."""
    x, y = features([49] * 40, dim, 3), features(lengths(40, 15, 32, 1), dim, 4)
    found: dict[str, float] = {}
    for epsilon in (0.05, 0.01):
        double = pair_costs(x.to(torch.float64), y, epsilon=epsilon, iterations=20).value
        for backend in ("numba", "torch"):
            value = pair_costs(x, y, epsilon=epsilon, iterations=20, backend=backend).value
            found[f"float64's iterate, ε {epsilon}, {backend}"] = float(((value - double).abs() / double).max())
        value = pair_costs(x, y, epsilon=epsilon, iterations=5000, tolerance=1e-4).value
        off = []
        for i in range(10):
            cost = (1 - x[i].double() @ y[i].double().T).numpy()
            a, b = (np.full(k, 1 / k) for k in cost.shape)
            plan = ot.bregman.sinkhorn_log(a, b, cost, epsilon, numItermax=5000, stopThr=1e-8, warn=False)
            kl = (plan * np.log(np.maximum(plan, 1e-300) / np.outer(a, b))).sum()
            off.append(abs(float(value[i]) - (plan * cost).sum() - epsilon * kl))
        found[f"converged POT, ε {epsilon}, numba"] = max(off)
    return found


def tail(n: int = 200) -> dict[str, float]:
    """µs a pair to an L1 marginal error of 1e-3 on matched sets, each pair stopping on its own."""
    x = features([49] * n, 256, 5)
    noise = 0.03 * torch.randn(n, 16, 256, generator=torch.Generator().manual_seed(6))
    y = FeatureSets.from_dense(torch.nn.functional.normalize(x.values.view(n, 49, 256)[:, :16] + noise, dim=2))
    found: dict[str, float] = {}
    for epsilon in (0.05, 0.01):
        how: dict[str, Any] = {"epsilon": epsilon, "iterations": 1000, "tolerance": 1e-3, "validate": False}
        work = {b: partial(pair_costs, x, y, backend=b, **how) for b in ("numba", "torch")}
        for backend, took in in_turn(work, 1).items():
            found[f"ε {epsilon}, {backend}"] = 1e6 * took / n
            found[f"ε {epsilon}, {backend}: iterations"] = float(work[backend]().iterations.float().mean())
    return found


def unrolled(x: Tensor, y: Tensor, iterations: int) -> Tensor:
    """The textbook way: log-sum-exps on the autograd graph, `[n, m]`, dense sets."""
    exponent = (torch.einsum("npd,mtd->nmpt", x, y) - 1) / EPSILON
    p, t = exponent.shape[2:]
    g = x.new_zeros(len(x), len(y), 1, t)
    for _ in range(iterations):
        f = -torch.logsumexp(exponent + g, 3, keepdim=True) + torch.tensor(float(t)).log()
        g = -torch.logsumexp(exponent + f, 2, keepdim=True) + torch.tensor(float(p)).log()
    return EPSILON * (f.mean((2, 3)) + g.mean((2, 3)))


def peak_mb(work: Callable[[], object]) -> float:
    """Resident memory at its highest during `work`, above that before (Linux); in a fork, so that none is reused."""
    import ctypes

    def status(key: str) -> float:
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
        return int(line.split()[1]) / 1024

    work()  # what is compiled or cached once is no part of it
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept after a free would be used again unseen
    receive, send = os.pipe()
    if os.fork() == 0:
        before = status("VmRSS")
        work()
        os.write(send, f"{status('VmHWM') - before}".encode())
        os._exit(0)
    os.wait()
    return float(os.read(receive, 64))


def against_unrolling(n: int = 48, p: int = 49, t: int = 16, iterations: int = 20) -> dict[str, float]:
    """Seconds and MB of a forward and backward pass over n × n pairs."""
    x, y = (features([size] * n, 128, size).values.view(n, size, 128).requires_grad_() for size in (p, t))

    def envelope(backend: Any) -> Callable[[], object]:
        def work() -> None:
            sets = FeatureSets.from_dense(x), FeatureSets.from_dense(y)
            all_costs(*sets, epsilon=EPSILON, iterations=iterations, backend=backend).value.sum().backward()

        return work

    work = {
        "envelope, numba": envelope("numba"),
        "envelope, torch": envelope("torch"),
        "unrolled": lambda: unrolled(x, y, iterations).sum().backward(),
    }
    times = in_turn(work, 3)
    return times | {f"{name}: MB": peak_mb(job) for name, job in work.items()}


def training_step(iterations: int) -> dict[str, float]:
    """256 × 256, 49 cells × up to 32 tokens (mean 12), d = 128: seconds, and MB of a step."""
    x, y = features([49] * 256, 128, 1), features(lengths(256, 12, 32, 0), 128, 2)
    x.values.requires_grad_(), y.values.requires_grad_()

    def forward(backend: Any, dtype: Any = None) -> Tensor:
        return all_costs(x, y, iterations=iterations, backend=backend, gemm_dtype=dtype, validate=False).value

    work = {
        "step, numba": lambda: forward("numba").sum().backward(),
        "step, torch": lambda: forward("torch").sum().backward(),
        "forward, numba": lambda: forward("numba"),
        "step, numba, bf16 GEMM": lambda: forward("numba", torch.bfloat16).sum().backward(),
    }
    times = in_turn(work, 3)
    return times | {"step, numba: MB": peak_mb(work["step, numba"])}


def alignment(batch: int = 128, cells: int = 64, negatives: int = 7) -> dict[str, float]:
    """ms of the alignment loss's transport, both ways: each image with its caption and `negatives` others."""
    x, y = features([cells] * batch, 128, 1), features(lengths(batch, 8, 24, 0), 128, 2)
    columns = torch.stack([torch.randperm(batch)[: 1 + negatives] for _ in range(batch)]).flatten()
    rows = torch.arange(batch).repeat_interleave(1 + negatives)

    def both_ways(backend: Any, listed: bool) -> Callable[[], object]:
        def work() -> None:
            values = [s.values.clone().requires_grad_() for s in (x, y)]
            sets = [FeatureSets(v, s.offsets) for v, s in zip(values, (x, y), strict=True)]
            how: dict[str, Any] = {"iterations": 10, "backend": backend, "validate": False}
            if listed:
                costs = pair_costs(*sets, pairs=(rows, columns), **how)
            else:
                costs = pair_costs(sets[0].take(rows), sets[1].take(columns), **how)
            costs.value.sum().backward()

        return work

    work = {
        "pairs=, numba": both_ways("numba", True),
        "take, numba": both_ways("numba", False),
        "take, torch (as it was)": both_ways("torch", False),
    }
    return {name: 1e3 * took for name, took in in_turn(work, 7).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    # Memory is measured in forks, which JAX's threads would not survive: before it is imported.
    result = {
        "48×48 pairs of 49×16, gradient": against_unrolling(),
        "256×256 of 49×12, 10 iterations": training_step(10),
    }
    result |= {
        f"µs a pair, costs given, 49×{name}, {iterations} iterations": cost_given(49, t, iterations)
        for name, t, iterations in (
            ("32", [32] * 256, 20),
            ("2…32 (mean 12)", lengths(256, 12, 32, 3), 20),
            ("16", [16] * 256, 10),
        )
    }
    result["µs a pair, doors, 49×12, d 256, 20 iterations"] = doors(49, lengths(256, 12, 32, 3), 256, 20)
    result["µs a pair, doors, 49×12, d 768, 20 iterations"] = doors(49, lengths(256, 12, 32, 3), 768, 20)
    result["distance"] = accuracy()
    result["matched pairs to 1e-3"] = tail()
    result["ms, alignment loss, batch 128"] = alignment()
    if as_json:
        print(json.dumps({"torch": torch.__version__, "POT": ot.__version__, **result}, ensure_ascii=False))
        return
    for name, numbers in result.items():
        print(name)
        first = next(iter(numbers.values()))
        for contender, number in numbers.items():
            print(f"  {contender:36} {number:10.4g}   {number / first:8.2f} × the first")


if __name__ == "__main__":
    main()
