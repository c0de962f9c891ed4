"""Transport side by side: against POT's log batch for values, against unrolled autograd for gradients.

    OMP_NUM_THREADS=1 python benchmarks/transport.py [--json]

One process, one thread, process CPU time, contenders in turn (round robin), medians. Unit vectors, synthetic
and clustered.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import ot
import torch
from torch import Tensor

from otcclip.transport import FeatureSets, all_costs, nearest, pair_costs

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


def in_turn(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median process seconds of each, measured in turn after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            if turn:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def against_pot(p: int, t: int, iterations: int, n: int = 256, dim: int = 256) -> dict[str, float]:
    """µs a pair, GEMM included on our side only; POT gets its costs made."""
    x, y = features([p] * n, dim, 1), features([t] * n, dim, 2)
    cost = 1 - x.values.view(n, p, dim) @ y.values.view(n, t, dim).transpose(1, 2)
    a, b = torch.full((n, p), 1 / p), torch.full((n, t), 1 / t)

    def pot(method: str) -> Callable[[], object]:
        def work() -> None:
            for i in range(0, n, 64):
                s = slice(i, i + 64)
                ot.solve_batch(cost[s], EPSILON, a[s], b[s], max_iter=iterations, tol=0.0, method=method, grad="detach")

        return work

    times = in_turn(
        {
            "pair_costs": lambda: pair_costs(x, y, epsilon=EPSILON, iterations=iterations),
            "all_costs": lambda: all_costs(x.take(range(16)), y, epsilon=EPSILON, iterations=iterations),
            "POT log, chunks of 64": pot("log_sinkhorn"),
            "POT sinkhorn, chunks of 64": pot("sinkhorn"),
        }
    )
    return {name: 1e6 * took / (16 * n if name == "all_costs" else n) for name, took in times.items()}


def unrolled(x: Tensor, y: Tensor, iterations: int) -> Tensor:
    """The textbook way: log-sum-exps on the autograd graph, `[n, m]`, dense sets."""
    exponent = (torch.einsum("npd,mtd->nmpt", x, y) - 1) / EPSILON
    p, t = exponent.shape[2:]
    g = x.new_zeros(len(x), len(y), 1, t)
    for _ in range(iterations):
        f = -torch.logsumexp(exponent + g, 3, keepdim=True) + torch.tensor(float(t)).log()
        g = -torch.logsumexp(exponent + f, 2, keepdim=True) + torch.tensor(float(p)).log()
    return EPSILON * (f.mean((2, 3)) + g.mean((2, 3)))


def against_unrolling(n: int = 32, p: int = 36, t: int = 12, iterations: int = 20) -> dict[str, float]:
    """Seconds of a forward and backward pass over n × n pairs."""
    x, y = (features([size] * n, 128, size).values.view(n, size, 128).requires_grad_() for size in (p, t))

    def envelope() -> None:
        sets = FeatureSets.from_dense(x), FeatureSets.from_dense(y)
        all_costs(*sets, epsilon=EPSILON, iterations=iterations).value.sum().backward()

    return in_turn({"envelope": envelope, "unrolled": lambda: unrolled(x, y, iterations).sum().backward()})


def training_step(iterations: int, gemm_dtype: torch.dtype | None) -> dict[str, float]:
    """Seconds of 256 × 256, 36 cells × up to 32 tokens (mean 12), d = 128: forward, and both ways."""
    x, y = features([36] * 256, 128, 1), features(lengths(256, 12, 32, 0), 128, 2)
    x.values.requires_grad_(), y.values.requires_grad_()

    def forward() -> Tensor:
        return all_costs(x, y, iterations=iterations, gemm_dtype=gemm_dtype).value

    return in_turn({"forward": forward, "forward + backward": lambda: forward().sum().backward()})


def search(m: int = 4000, n: int = 16) -> dict[str, float]:
    """Seconds for n queries over a pool of m, default ε; strong features."""
    x, y = features([36] * n, 128, 1), features(lengths(m, 12, 32, 0), 128, 2)
    return in_turn(
        {
            "exact": lambda: nearest(x, y),
            "top 128": lambda: nearest(x, y, screen=128),
            "brute force": lambda: all_costs(x, y).value.min(1),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    as_json = parser.parse_args().json
    torch.set_num_threads(1)
    result = {
        f"µs a pair, {p}×{t}, {iterations} iterations": against_pot(p, t, iterations)
        for p, t, iterations in ((49, 16, 10), (49, 16, 20), (49, 32, 20))
    }
    result["s, 32×32 pairs of 36×12, gradient, 20 iterations"] = against_unrolling()
    for iterations in (10, 20):
        for dtype in (None, torch.bfloat16):
            name = f"s, 256×256 step, {iterations} iterations, {'bf16' if dtype else 'f32'} GEMM"
            result[name] = training_step(iterations, dtype)
    result["s, 16 queries in 4000"] = search()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if as_json:
        print(json.dumps({"torch": torch.__version__, "POT": ot.__version__, "peak_MB": peak, **result}))
        return
    for name, times in result.items():
        ours = next(iter(times.values()))
        print(name)
        for contender, took in times.items():
            print(f"  {contender:28} {took:10.4g}   {took / ours:6.2f} × the first")
    print(f"peak resident memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
