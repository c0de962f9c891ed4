"""Do real towers train under every defence? RN50 and ViT-B-32 at 224 px on a CPU, with the peak memory of each run.

    python benchmarks/towers.py --steps 20 [--models RN50 ViT-B-32] [--defenses clip otcclip] [--batch-size 8]

Each run is a process of its own, so its peak is its own: the highest resident set, evidence and optimiser included.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from two_processes import SMALL, pictures

from otcclip import defenses
from otcclip.data.pairs import PairStore
from otcclip.defenses.base import training_pairs
from otcclip.models import create_two_tower
from otcclip.specs import takes
from otcclip.training.loop import TrainConfig, Trainer


def store_of(n: int, size: int) -> PairStore:
    small = pictures(n)
    images = torch.from_numpy(small.images).permute(0, 3, 1, 2).float()
    large = F.interpolate(images, size=(size, size), mode="bicubic").clamp(0, 255).permute(0, 2, 3, 1)
    return PairStore(small.keys, np.ascontiguousarray(large.to(torch.uint8).numpy()), small.captions)


def run(model_name: str, name: str, steps: int, batch: int, queue: Any) -> None:
    torch.set_num_threads(1)
    model = create_two_tower(model_name, seed=0)
    pairs_in_epoch = 4 * batch
    store = store_of(max(pairs_in_epoch, 32), model.image_size)
    pairs = training_pairs(store, model, store.keys[:12])
    options = {key: value for key, value in SMALL.items() if takes(defenses.DEFENSES[name], key)}
    epochs = max(2, -(-steps * batch // len(pairs)))
    config = TrainConfig(epochs=epochs, batch_size=batch, lr=1e-4)
    trainer = Trainer(model, defenses.make(name, **options), pairs, config)
    losses: list[float] = []
    plain = trainer._step
    start = time.perf_counter()

    class Enough(Exception):
        pass

    def step(of: Any) -> Any:
        done = plain(of)
        losses.append(float(done.loss.detach()))
        if len(losses) == steps:
            raise Enough
        return done

    trainer._step = step  # type: ignore[method-assign]
    with contextlib.suppress(Enough):
        list(trainer.epochs())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put((len(losses), losses[0], losses[-1], (time.perf_counter() - start) / max(len(losses), 1), peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["RN50", "ViT-B-32"])
    parser.add_argument("--defenses", nargs="+", default=list(defenses.DEFENSES))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("fork")
    print(f"{'model':>9} {'defence':>14} {'steps':>5} {'first':>7} {'last':>7} {'s/step':>7} {'peak GiB':>8}")
    for model in arguments.models:
        for name in arguments.defenses:
            queue = context.Queue()
            worker = context.Process(target=run, args=(model, name, arguments.steps, arguments.batch_size, queue))
            worker.start()
            steps, first, last, seconds, peak = queue.get()
            worker.join()
            print(
                f"{model:>9} {name:>14} {steps:>5} {first:>7.3f} {last:>7.3f} {seconds:>7.2f} {peak:>8.2f}", flush=True
            )


if __name__ == "__main__":
    main()
