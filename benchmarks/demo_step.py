"""What of a training step of the demo is transport? Steps with and without the alignment loss, side by side.

    python benchmarks/demo_step.py [--rounds 8] [--steps 6] [--corpus corpora/emoji]

The demo's model, pairs, batches and precision, one thread. Three trainers of equal weights take turns, `steps` steps a
round: undefended, `otcclip` without the alignment loss, and `otcclip`. Printed: the median of the rounds' seconds a
step, its ratio to undefended, the share of a step that the alignment loss adds (the bar is 15 %), and what one ranking
of every caption at a refresh costs against the same without transport.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median

import torch

from otcclip.data.emoji_load import load_emoji
from otcclip.defenses import Defense, OTCClip, make
from otcclip.defenses.base import EpochPlan, PairBatch, TrainingPairs, training_pairs
from otcclip.evidence.matching import own_share
from otcclip.models import create_two_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.fold import folded
from otcclip.training.batches import EpochBatches
from otcclip.training.distributed import ALONE
from otcclip.training.experiment import RunSpec
from otcclip.training.loop import TrainConfig, Trainer

ASKED = 1024  # images that are ranked


def batches(pairs: TrainingPairs, config: TrainConfig) -> Iterator[PairBatch]:
    plan = EpochPlan("train", torch.arange(len(pairs)), pairs.caption_of)
    epoch = EpochBatches(pairs, plan, config.views(), batch_size=config.batch_size, seed=0, world=ALONE, spread=False)
    return cycle(epoch.start(0))


def step_seconds(trainer: Trainer, taken: list[PairBatch]) -> float:
    start = time.perf_counter()
    for batch in taken:
        trainer._step(batch)
    return (time.perf_counter() - start) / len(taken)


@torch.no_grad()
def refresh_seconds(trainer: Trainer, pairs: TrainingPairs) -> dict[str, float]:
    """One view of `ASKED` images: towers, as a refresh runs them, then the ranking without and with transport."""
    trainer.model.eval()
    judge = folded(trainer.model)
    times = [time.perf_counter()]
    text = encode_captions(trainer.model, pairs.tokens)
    image = encode_images(judge, pairs.images, None, rows=torch.arange(ASKED))
    times.append(time.perf_counter())
    for share in (0.0, 0.5):
        own_share(image, text, pairs.caption_of[:ASKED], local_share=share)
        times.append(time.perf_counter())
    towers, pooled, both = (b - a for a, b in pairwise(times))
    return {"towers": towers, "ranking, pooled alone": pooled, "ranking, with transport": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainConfig()
    crew: dict[str, Defense] = {
        "clip": make("clip"),
        "otcclip without alignment": OTCClip(lambda_ot=0.0),
        "otcclip": OTCClip(),
    }
    first = create_two_tower(RunSpec.model, seed=0)
    pairs = training_pairs(load_emoji(options.corpus, first.image_size).train.without_labels(), first)
    trainers = {
        name: Trainer(create_two_tower(RunSpec.model, seed=0), defense, pairs, config) for name, defense in crew.items()
    }
    supply = batches(pairs, config)
    taken: dict[str, list[float]] = {name: [] for name in crew}
    for turn in range(options.rounds + 1):
        same = list(islice(supply, options.steps))
        for name, trainer in trainers.items():
            seconds = step_seconds(trainer, same)
            if turn:  # the first round compiles
                taken[name].append(seconds)
    step = {name: median(seconds) for name, seconds in taken.items()}
    share = 1 - step["otcclip without alignment"] / step["otcclip"]
    refresh = refresh_seconds(trainers["otcclip"], pairs)
    for name, seconds in step.items():
        print(
            f"{name:28s} {1000 * seconds:8.1f} ms a step of {config.batch_size}   {seconds / step['clip']:5.2f}x clip"
        )
    print(f"transport in the loss: {share:.1%} of a step (bar 15 %)")
    print(f"a refresh's view of {ASKED} images: " + ", ".join(f"{k} {v:.2f} s" for k, v in refresh.items()))
    if options.json:
        Path(options.json).write_text(json.dumps({"step": step, "share": share, "refresh": refresh}, indent=1))


if __name__ == "__main__":
    main()
