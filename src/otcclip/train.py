"""One of the processes of `otcclip train`:

    torchrun --nproc-per-node 8 -m otcclip.train -- --train-data "cc3m/{00000..00331}.tar" --model RN50 --batch-size 128

The same options as `otcclip train`, which is this with one process; `--` ends torchrun's own, which would else take
`--logs` for one of them cut short. A rank that dies takes the others with it, in a line; the same command with
`--resume latest` goes on from the last checkpoint.
"""

from __future__ import annotations

import os
import sys

import tyro

from otcclip.errors import UserError
from otcclip.training.run import train
from otcclip.training.train_spec import TrainSpec

GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "timed out", "NCCL", "gloo")


def main(argv: list[str] | None = None) -> int:
    """Run this process; returns its exit code."""
    spec = tyro.cli(TrainSpec, prog="otcclip.train", description=__doc__, args=argv)
    rank = os.environ.get("RANK", "0")
    try:
        train(spec)
    except UserError as error:
        print(f"otcclip: {error}" if rank == "0" else f"otcclip (rank {rank}): {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("otcclip: stopped; --resume latest goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ or not any(word in str(error) for word in GONE):
            raise
        print(f"otcclip (rank {rank}): another rank died or hangs; --resume latest goes on", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
