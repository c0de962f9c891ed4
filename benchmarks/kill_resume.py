"""Kill -9 a training run at random moments, resume each time: does it end with the weights of a run never killed?

    python benchmarks/kill_resume.py --kills 20 [--processes 2] [--pairs 96] [--defense otcclip]

One process: the weights are to be bit-identical. Two processes: equal to 1e-5. A kill falls at a time drawn uniformly
from the second after a run has taken up its work, whatever it is doing then: a step, a checkpoint, an epoch's start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import pictures

from otcclip.data import Pair, write_shard
from otcclip.training.checkpoint import load_state
from otcclip.training.judge import png
from otcclip.training.run import train
from otcclip.training.train_spec import TrainSpec

WINDOW = 1.0  # seconds


def _rank(spec: TrainSpec, rank: int, processes: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    train(spec)


def launch(spec: TrainSpec, processes: int) -> list[BaseProcess]:
    """Ranks as forks of this process: they share its imports, and nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks: list[BaseProcess] = [
        context.Process(target=_rank, args=(spec, r, processes, port)) for r in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def finish(spec: TrainSpec, processes: int) -> None:
    for rank in launch(spec, processes):
        rank.join()
        if rank.exitcode:
            raise SystemExit(f"a run ended by itself with {rank.exitcode}")


def killed(spec: TrainSpec, processes: int, delay: float) -> str:
    """Start or resume the run, and kill it `delay` seconds after its first checkpoint; where the checkpoint is then."""
    last = spec.folder / "checkpoint" / "last.pt"
    before = last.stat().st_mtime_ns if last.exists() else 0
    ranks = launch(spec, processes)
    while all(rank.is_alive() for rank in ranks) and not (last.exists() and last.stat().st_mtime_ns != before):
        time.sleep(0.005)
    time.sleep(delay)
    alive = [rank for rank in ranks if rank.is_alive() and rank.pid is not None]
    for rank in alive:
        os.kill(rank.pid or 0, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    if not alive:
        raise SystemExit("the run finished before it could be killed: more --pairs")
    state = load_state(last)
    return f"{state['epoch']}/{state.get('place', {}).get('step', 0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--defense", default="otcclip:alpha=0.15,first_refresh=1,refresh=1")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = pictures(arguments.pairs)
        rows = zip(store.keys, store.images, store.captions, strict=True)
        write_shard(folder / "0.tar", (Pair(key, png(image), caption) for key, image, caption in rows))

        def spec(run: str) -> TrainSpec:
            return TrainSpec(
                str(folder / "0.tar"),
                model="otcclip-tiny",
                defense=arguments.defense,
                batch_size=8 // arguments.processes,
                epochs=arguments.epochs,
                precision="fp32" if arguments.processes > 1 else "amp_bf16",
                workers=0,
                logs=str(folder / "logs"),
                name=run,
                report_to="none",
                resume="latest",
                save_seconds=0.0,
                device="cpu",
                threads=1,
            )

        finish(spec("whole"), arguments.processes)
        for kill in range(arguments.kills):
            place = killed(spec("cut"), arguments.processes, chance.uniform(0, WINDOW))
            print(f"kill {kill + 1}: last checkpoint at epoch/step {place}", flush=True)
        finish(spec("cut"), arguments.processes)
        one, other = (load_state(spec(run).folder / "checkpoint" / "last.pt")["model"] for run in ("whole", "cut"))
        worst = max(float((one[k].double() - other[k].double()).abs().max()) for k in one)
        same = all(torch.equal(one[k], other[k]) for k in one)
        print(json.dumps({"kills": arguments.kills, "bit_identical": same, "largest_difference": worst}))


if __name__ == "__main__":
    main()
