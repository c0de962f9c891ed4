"""Search side by side: `nearest` against brute force, against one GEMM over pooled vectors, and faiss.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/transport_search.py \\
        [--million FOLDER] [--run FOLDER] [--json] [--plot PNG]

Every caption of a pool has a centre of its own; its tokens, and the patches of the image it belongs to, scatter
about it: `cos` is the mean cosine of a vector to its centre. "Strong" features have .89, "weak" ones .5 with 64
centres for all, so that nothing stands out. --million makes a pool of 1e6 captions in FOLDER (4 GB of bfloat16,
memory-mapped) and follows cost over its first 1e3, 1e4, 1e5 and all. --run takes the towers of a finished run of the
demo: queries are test images, the pool the emoji's names and pairs of names ("A with B").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from otcclip.data.emoji_load import load_emoji
from otcclip.models import load_two_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.training.experiment import RunSpec
from otcclip.transport import FeatureSets, Nearest, Summary, all_costs, load, nearest
from transport import features, in_turn, lengths

DIM, PATCHES, QUERIES, SCREEN = 256, 49, 32, 128


def centres(low: int, high: int) -> torch.Tensor:
    """Unit centres of captions low … high; the same whichever stretch they are asked in, by blocks of 10,000."""
    blocks = range(low // 10_000, (high + 9_999) // 10_000)
    made = torch.cat([torch.randn(10_000, DIM, generator=torch.Generator().manual_seed(7 + b)) for b in blocks])
    return normalize(made[low - 10_000 * blocks[0] : high - 10_000 * blocks[0]], dim=1)


def about(middle: torch.Tensor, sizes: list[int], spread: float, seed: int) -> torch.Tensor:
    noise = torch.randn(sum(sizes), DIM, generator=torch.Generator().manual_seed(seed)) * spread / DIM**0.5
    return normalize(middle.repeat_interleave(torch.tensor(sizes), 0) + noise, dim=1)


def own_centres(m: int, spread: float) -> tuple[FeatureSets, FeatureSets]:
    """Queries whose own captions are spread over a pool of m; tokens 4…16, mean 8."""
    sizes = lengths(m, 8, 16, 1)
    offsets = torch.tensor([0, *np.cumsum(sizes).tolist()])
    pool = FeatureSets(about(centres(0, m), sizes, spread, 2), offsets)
    return queries(m, spread), pool


def queries(m: int, spread: float) -> FeatureSets:
    own = torch.cat([centres(i, i + 1) for i in range(0, m, m // QUERIES)][:QUERIES])
    return FeatureSets.from_dense(about(own, [PATCHES] * QUERIES, spread, 3).view(QUERIES, PATCHES, DIM))


def side_by_side(x: FeatureSets, y: FeatureSets, **how: Any) -> tuple[dict[str, float], Nearest]:
    """ms a query, exact, by brute force and of a top 128, and whether exact and brute force agree; the exact answer."""
    work: dict[str, Callable[[], object]] = {
        "exact": lambda: nearest(x, y, **how),
        "brute force": lambda: all_costs(x, y, validate=False).value.min(1),
        f"top {SCREEN}": lambda: nearest(x, y, screen=SCREEN, **how),
    }
    brute, found = all_costs(x, y, validate=False).value, nearest(x, y, **how)
    result = {name: 1e3 * took / QUERIES for name, took in in_turn(work, 3).items()}
    same = brute.gather(1, found.index)[:, 0] <= brute.min(1).values + 2e-6
    return result | {"same argmin, share": float(same.double().mean())}, found


def ten_thousand(strong: bool, m: int = 10_000) -> dict[str, float]:
    """ms a query over 10,000 captions, summary made on the way; and whether the answers are the same."""
    if strong:
        x, y = own_centres(m, 0.5)
    else:
        x, y = features([PATCHES] * QUERIES, DIM, 1, 1.7), features(lengths(m, 8, 16, 1), DIM, 2, 1.7)
    result, found = side_by_side(x, y, validate=False)
    result["certified, share"] = float(found.certified.double().mean())
    result["solved a query"] = float(found.solved.double().mean())
    return result


def of_a_run(folder: Path, corpus: str, m: int) -> dict[str, float]:
    """ms a query over m captions with trained towers' features, summary made once; how tightly sets hang together."""
    model = load_two_tower(folder, RunSpec.model).eval()
    split = load_emoji(corpus, model.image_size)
    images = torch.from_numpy(split.test.images).permute(0, 3, 1, 2)
    seen = encode_images(model, images, rows=torch.arange(0, len(images), len(images) // QUERIES)[:QUERIES])
    pair = torch.randint(len(split.names), (m, 2), generator=torch.Generator().manual_seed(7))
    made = [f"{split.names[a]} with {split.names[b]}" for a, b in pair.tolist()]
    said = encode_captions(model, model.tokenize([*split.names, *made][:m]))
    x, y, towers = seen.local, said.local, (seen.pooled, said.pooled)
    how: dict[str, Any] = {"summary": Summary.of(y, torch.bfloat16), "validate": False}
    result, found = side_by_side(x, y, **how)
    screened = nearest(x, y, screen=SCREEN, **how)
    result["certified, exact"] = float(found.certified.double().mean())
    result["certified, top 128"] = float(screened.certified.double().mean())
    result["recall@1, top 128"] = float((screened.index == found.index).double().mean())
    pooled = nearest(x, y, screen=SCREEN, pooled_queries=towers[0], pooled_pool=towers[1], **how)
    result["recall@1, top 128, towers' pooled"] = float((pooled.index == found.index).double().mean())
    result["solved, exact"] = float(found.solved.double().mean())
    result["cos to the centre, patches"] = float(Summary.of(x).length.mean())
    result["cos to the centre, tokens"] = float(Summary.of(y).length.mean())
    return result


def certified_by_spread(m: int = 20_000) -> dict[str, float]:
    """Share of queries that the top 128 certifies, by how tightly sets hang together."""
    found: dict[str, float] = {}
    for spread in (0.3, 0.5, 0.75, 1.0, 1.5):
        x, y = own_centres(m, spread)
        answer = nearest(x, y, screen=SCREEN, validate=False)
        found[f"cos {1 / (1 + spread**2) ** 0.5:.2f}"] = float(answer.certified.double().mean())
    return found


def make_million(folder: Path, m: int = 1_000_000, spread: float = 0.5) -> tuple[FeatureSets, Summary]:
    """The pool on disk, made once, and its summary in bfloat16."""
    if not (folder / "offsets.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = lengths(m, 8, 16, 1)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        shape = (int(offsets[-1]), DIM)
        values = np.lib.format.open_memmap(folder / "values.bfloat16.npy", "w+", np.int16, shape)
        for low in range(0, m, 10_000):
            some = about(centres(low, low + 10_000), sizes[low : low + 10_000], spread, 1000 + low)
            values[offsets[low] : offsets[low + 10_000]] = some.bfloat16().view(torch.int16).numpy()
        values.flush()
        np.save(folder / "offsets.npy", offsets)
    pool = load(folder)
    start = time.process_time()
    summary = Summary.of(pool, torch.bfloat16)
    print(f"summary of {m:,} sets: {time.process_time() - start:.0f} s of one core", flush=True)
    return pool, summary


def by_size(folder: Path, spread: float = 0.5) -> dict[str, dict[str, float]]:
    """ms a query over growing stretches of the pool, beside one GEMM of the same pooled vectors."""
    whole, everything = make_million(folder)
    x = queries(len(whole), spread)
    result: dict[str, dict[str, float]] = {}
    for m in (1_000, 10_000, 100_000, 1_000_000):
        pool, summary = whole.stretch(0, m), everything.stretch(0, m)
        x = queries(m, spread)
        mine = Summary.of(x).direction.bfloat16()

        def gemm(mine: Any = mine, summary: Any = summary) -> None:
            for low in range(0, len(summary), 8192):
                mine @ summary.direction[low : low + 8192].T

        how: dict[str, Any] = {"summary": summary, "validate": False}
        work: dict[str, Callable[[], object]] = {
            "bf16 GEMM": gemm,
            f"top {SCREEN}": lambda x=x, pool=pool, how=how: nearest(x, pool, screen=SCREEN, **how),
            "exact": lambda x=x, pool=pool, how=how: nearest(x, pool, **how),
        }
        if m <= 10_000:
            work["brute force"] = lambda x=x, pool=pool: all_costs(x, pool, validate=False).value.min(1)
        numbers = {name: 1e3 * took / QUERIES for name, took in in_turn(work, 3).items()}
        screened, exact = nearest(x, pool, screen=SCREEN, **how), nearest(x, pool, **how)
        numbers["certified, top 128"] = float(screened.certified.double().mean())
        numbers["recall@1, top 128"] = float((screened.index == exact.index).double().mean())
        numbers["solved, exact"] = float(exact.solved.double().mean())
        numbers["solved, top 128"] = float(screened.solved.double().mean())
        result[f"{m:,} captions"] = numbers
    return result


def against_faiss(folder: Path, m: int) -> dict[str, float]:
    """ms a query for the 128 pooled neighbours: our screen's GEMM, and an inverted file of faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
    pool = load(folder).stretch(0, m)
    summary = Summary.of(pool, torch.bfloat16)
    mine, theirs = Summary.of(queries(m, 0.5)).direction, summary.direction.float().numpy()
    lists = int(4 * m**0.5)
    index = faiss.index_factory(DIM, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    start = time.process_time()
    index.train(theirs[:: max(1, m // (40 * lists))])
    index.add(theirs)
    built = time.process_time() - start
    index.nprobe = 32
    work: dict[str, Callable[[], object]] = {
        "bf16 GEMM and top 128": lambda: (mine.bfloat16() @ summary.direction.T).topk(SCREEN),
        "faiss IVF, 32 probes": lambda: index.search(mine.numpy(), SCREEN),
    }
    result = {name: 1e3 * took / QUERIES for name, took in in_turn(work, 3).items()}
    exact = (mine @ summary.direction.float().T).topk(SCREEN).indices
    found = torch.from_numpy(index.search(mine.numpy(), SCREEN)[1])
    shared = [len(set(a) & set(b)) / SCREEN for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    return result | {"faiss: recall@128": sum(shared) / len(shared), "faiss: s to build": built}


def plot(result: dict[str, dict[str, float]], path: Path) -> None:
    """Cost and pairs solved against the size of the pool."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = {name: int(name.split()[0].replace(",", "")) for name in result if name.endswith("captions")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colour = {"brute force": "C3", "exact": "C0", f"top {SCREEN}": "C1", "bf16 GEMM": "C7"}
    for name in colour:
        points = [(m, result[row][name]) for row, m in sizes.items() if name in result[row]]
        left.loglog(*zip(*points, strict=True), marker="o", color=colour[name], label=name)
    for name in ("exact", f"top {SCREEN}"):
        solved = [result[row][f"solved, {name}"] for row in sizes]
        right.loglog(list(sizes.values()), solved, marker="o", color=colour[name], label=name)
    right.loglog(list(sizes.values()), list(sizes.values()), color="grey", linestyle=":", label="all pairs")
    left.set(xlabel="captions in the pool", ylabel="ms a query, one core")
    right.set(xlabel="captions in the pool", ylabel="pairs solved a query")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--million", type=Path, metavar="FOLDER", help="where the pool of 1e6 captions is or goes")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run of the demo: its towers' features")
    parser.add_argument("--corpus", default="corpora/emoji", help="with --run")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --million: where to draw cost against size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "ms a query, 10,000 captions, strong": ten_thousand(True),
        "ms a query, 10,000 captions, weak": ten_thousand(False),
        "certified by the top 128 of 20,000": certified_by_spread(),
    }
    if options.million:
        result |= by_size(options.million)
        result["faiss, 100,000"] = against_faiss(options.million, 100_000)
        if options.plot:
            plot(result, options.plot)
    if options.run:
        for m in (1_000, 10_000, 100_000):
            result[f"ms a query, {m:,} captions, towers of {options.run}"] = of_a_run(options.run, options.corpus, m)
    if options.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for name, numbers in result.items():
        print(name)
        for contender, number in numbers.items():
            print(f"  {contender:28} {number:10.4g}")


if __name__ == "__main__":
    main()
