"""Where a run's numbers go while it runs, besides `history.jsonl`: tensorboard, Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from otcclip.errors import UserError


class Writers:
    """`--report-to tensorboard | wandb | all | none`."""

    def __init__(self, report_to: str, folder: Path, first_epoch: int = 0) -> None:
        wanted = {"all": {"tensorboard", "wandb"}, "none": set(), "": set()}.get(report_to, set(report_to.split(",")))
        if unknown := sorted(wanted - {"tensorboard", "wandb"}):
            raise UserError(f"--report-to {unknown[0]!r}: tensorboard, wandb, all or none")
        self._board, self._wandb = None, None
        if "tensorboard" in wanted:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)
        if "wandb" in wanted:
            try:
                self._wandb = importlib.import_module("wandb")
            except ImportError:
                raise UserError("--report-to wandb: the wandb package is not installed") from None
            self._wandb.init(project="otcclip", id=folder.name, name=folder.name, resume="allow")

    def write(self, line: Mapping[str, Any]) -> None:
        """Every number of a history line, nested names joined by slashes."""
        numbers = dict(_numbers("", line))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, line["epoch"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["epoch"])

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{prefix}/{name}" if prefix else str(name), inner)
    elif isinstance(value, int | float):
        yield prefix, float(value)
