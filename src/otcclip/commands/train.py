"""`otcclip train`."""

from __future__ import annotations

from typing import Annotated

import tyro

from otcclip.training.train_spec import TrainSpec


def train(spec: Annotated[TrainSpec, tyro.conf.OmitArgPrefixes]) -> None:
    """Train on your own pairs, with or without a defence; on many GPUs, `torchrun -m otcclip.train -- ...`.

    Args:
        spec: settings of the run.
    """
    from otcclip.progress import console
    from otcclip.training.run import train as run

    result = run(spec)
    if result:
        console.print(f"loss {result['loss']:.4f} after {result['seconds']:.0f} s; model: {result['pretrained']}")
