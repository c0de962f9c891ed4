"""Does a batch spread over two processes train like a batch in one? Losses step by step, for every defence.

    python benchmarks/two_processes.py --steps 50 [--defenses clip otcclip] [--float32] [--vit]

Trains the tiny model on synthetic pairs, once alone and once over two gloo processes with the same global batch, and
prints the largest difference of a step's loss. The bar is 1e-5 (issue 8).

In float64 by default: the question is whether two processes compute the same thing, and in float32 a ReLU whose
input is zero but for rounding can go either way, which with eight images moves the next loss by 1e-4. `--float32`
shows that, and beside it what rounding alone does: one process against one whose weights start a last bit apart.
`--vit` takes a small vision transformer instead of the ResNet: GELU has no corner.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from otcclip import defenses
from otcclip.data.pairs import PairStore
from otcclip.defenses.base import TrainingPairs, training_pairs
from otcclip.models import create_two_tower
from otcclip.training.distributed import ALONE, World, join, leave
from otcclip.training.loop import TrainConfig, Trainer

RESNET, VIT = "otcclip-tiny", "two-processes-vit"
VIT_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
SMALL = {"alpha": 0.15, "first_refresh": 1, "refresh": 1, "unimodal_epochs": 1, "slow_epochs": 0}
BATCH, PAIRS, LR = 8, 40, 5e-4


def pictures(n: int, seed: int = 0) -> PairStore:
    """`n` noisy pictures of eight patterns; every seventh has another pattern's caption."""
    rng = np.random.default_rng(seed)
    pattern = rng.uniform(0, 255, (8, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    kind = np.arange(n) % 8
    images = (pattern[kind] * rng.uniform(0.8, 1.1, (n, 1, 1, 1)) + rng.normal(0, 9, (n, 64, 64, 3))).clip(0, 255)
    said = np.where(np.arange(n) % 7 == 6, (kind + 3) % 8, kind)
    captions = tuple(f"thing {'abcdefgh'[k]} | tag {i % 5}" for i, k in enumerate(said))
    return PairStore(tuple(f"pair-{i:03d}" for i in range(n)), images.astype(np.uint8), captions)


def register_vit() -> str:
    """Tell open_clip of the small vision transformer; its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{VIT}.json"
        path.write_text(json.dumps(VIT_CONFIG))
        open_clip.add_model_config(path)
    return VIT


def losses(
    name: str, steps: int, world: World, *, double: bool = True, nudged: bool = False, tower: str = RESNET
) -> list[float]:
    """The loss of each of the first `steps` steps under a defence.

    Args:
        double: whether in float64. nudged: whether the weights start a last bit of float32 apart.
    """
    takes = inspect.signature(defenses.DEFENSES[name]).parameters
    options: dict[str, Any] = {option: value for option, value in SMALL.items() if option in takes}
    model = create_two_tower(tower, seed=0)
    if nudged:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2.0**-23 * torch.randint(-1, 2, p.shape, generator=generator))
    if double:
        model = model.double()
    store = pictures(PAIRS)
    pairs: TrainingPairs = training_pairs(store, model, store.keys[:12])
    defense = defenses.make(name, **options)
    epochs = -(-steps * BATCH // PAIRS)
    config = TrainConfig(epochs=max(2, epochs), batch_size=BATCH, precision="fp32", seed=3, lr=LR)
    trainer = Trainer(model, defense, pairs, config, world)
    out: list[float] = []
    plain = trainer._step

    def step(batch: Any) -> Any:
        done = plain(batch)
        out.append(float(done.loss.detach()))
        return done

    trainer._step = step  # type: ignore[method-assign]
    for _ in trainer.epochs():
        if len(out) >= steps:
            break
    return out[:steps]


def spread(names: list[str], steps: int, processes: int, double: bool, vit: bool) -> dict[str, list[float]]:
    """`losses` of each defence over `processes` gloo processes on this machine, as rank 0 saw them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "losses.json"
        command = [sys.executable, __file__, "--steps", str(steps), "--rank-out", str(out)]
        command += [*([] if double else ["--float32"]), *(["--vit"] if vit else []), "--defenses", *names]
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env={**common, "WORLD_SIZE": str(processes), "RANK": rank, "LOCAL_RANK": rank})
            for rank in map(str, range(processes))
        ]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found


def _worst(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--vit", action="store_true")
    parser.add_argument("--defenses", nargs="+", default=list(defenses.DEFENSES))
    parser.add_argument("--rank-out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, double = arguments.steps, not arguments.float32
    tower = register_vit() if arguments.vit else RESNET
    if arguments.rank_out:
        world = join("cpu")
        found = {name: losses(name, steps, world, double=double, tower=tower) for name in arguments.defenses}
        if world.is_first:
            Path(arguments.rank_out).write_text(json.dumps(found))
        leave()
        return
    two = spread(arguments.defenses, steps, 2, double, arguments.vit)
    print(f"{'defence':>14} {'steps':>5} {'first':>9} {'last':>9} {'two processes':>13} {'by rounding':>11}")
    for name in arguments.defenses:
        one = losses(name, steps, ALONE, double=double, tower=tower)
        line = f"{name:>14} {len(one):>5} {one[0]:>9.6f} {one[-1]:>9.6f} {_worst(one, two[name]):>13.1e}"
        if not double:
            nudged = losses(name, steps, ALONE, double=False, nudged=True, tower=tower)
            line += f" {_worst(one, nudged):>11.1e}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
