"""Samples a second of our loader against a plain webdataset loop on the same shards; how long the demo waits.

    python benchmarks/loader.py [--pairs 512] [--workers 0 1] [--rounds 3]

Both decode JPEGs of 320 x 256 with PIL to 224 px (bicubic, centre crop) in batches of 64. The plain loop reads tars
front to back with a shuffle buffer of 1,000; ours visits the whole data set in random order. Each round times both, one
after the other; the ratio is of each round's two times. Bars (issue 8): 0.95 or more; the demo waits under 5 % of its
training time.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from two_processes import pictures

from otcclip import defenses
from otcclip.data import Pair, open_pairs, write_shard
from otcclip.data.images import DecodedOnDemand
from otcclip.defenses.base import training_pairs
from otcclip.models import create_two_tower
from otcclip.training import batches
from otcclip.training.loop import TrainConfig, Trainer

SIZE, BATCH = 224, 64


def jpeg(rng: np.random.Generator) -> bytes:
    """A picture with the frequencies of a photograph, so that it compresses like one."""
    coarse = Image.fromarray(rng.integers(0, 255, (16, 20, 3)).astype(np.uint8)).resize(
        (320, 256), Image.Resampling.BICUBIC
    )
    noisy = (np.asarray(coarse) + rng.normal(0, 8, (256, 320, 3))).clip(0, 255).astype(np.uint8)
    handle = io.BytesIO()
    Image.fromarray(noisy).save(handle, "JPEG", quality=85)
    return handle.getvalue()


def make_shards(folder: Path, pairs: int) -> str:
    rng = np.random.default_rng(0)
    for shard in range(4):
        rows = (Pair(f"{shard}-{i:05d}", jpeg(rng), f"caption {i}") for i in range(pairs // 4))
        write_shard(folder / f"{shard}.tar", rows, "jpg")
    return str(folder / "{0..3}.tar")


def plain(shards: str, workers: int) -> int:
    """The loop that webdataset's documentation shows."""
    transform = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.PILToTensor(),
        ]
    )
    data = (
        wds.WebDataset(shards, shardshuffle=4, empty_check=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: text)
        .batched(BATCH)
    )
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
    return sum(len(images) for images, _ in loader)


def ours(images: DecodedOnDemand) -> int:
    order = torch.randperm(len(images)).split(BATCH)
    return sum(len(batch) for batch in images.batches(order))


def waiting() -> float:
    """Share of the demo's training time spent in fetching images, batch 128 at 64 px, held in memory."""
    model = create_two_tower("otcclip-tiny", seed=0)
    pairs = training_pairs(pictures(512), model)
    trainer = Trainer(model, defenses.make("clip"), pairs, TrainConfig(epochs=1, batch_size=128))
    spent = 0.0
    real = batches.fetch

    def timed(*arguments: object) -> object:
        nonlocal spent
        source = real(*arguments)  # type: ignore[arg-type]
        while True:
            start = time.perf_counter()
            item = next(source, None)
            spent += time.perf_counter() - start
            if item is None:
                return
            yield item

    batches.fetch = timed  # type: ignore[assignment]
    (report,) = trainer.epochs()
    return spent / report.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder, arguments.pairs)
        print(f"{'workers':>7}  {'plain/s':>8}  {'ours/s':>8}  {'ratio':>6}  ratio of each round")
        for workers in arguments.workers:
            data = open_pairs(shards, "webdataset", SIZE, folder / "cache", workers=workers, decoded_gib=0.0)
            assert isinstance(data.images, DecodedOnDemand)
            rates: list[tuple[float, float]] = []
            for _ in range(arguments.rounds):
                times = []
                for loop in (lambda w=workers: plain(shards, w), lambda d=data.images: ours(d)):
                    start = time.perf_counter()
                    assert loop() == arguments.pairs
                    times.append(arguments.pairs / (time.perf_counter() - start))
                rates.append((times[0], times[1]))
            ratios = [b / a for a, b in rates]
            one, other = (statistics.median(rate[i] for rate in rates) for i in (0, 1))
            each = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{workers:>7}  {one:>8.0f}  {other:>8.0f}  {statistics.median(ratios):>6.2f}  {each}", flush=True)
    print(f"the demo waits for images {waiting():.2%} of its training time (clip, the cheapest step)")


if __name__ == "__main__":
    main()
