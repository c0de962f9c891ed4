"""Training state on disk: written whole or not at all, read without unpickling code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otcclip.data.atomic import atomic_file, write_text
from otcclip.errors import UserError

if TYPE_CHECKING:
    from otcclip.training.loop import Trainer

LAST = Path("checkpoint") / "last.pt"
History = list[dict[str, Any]]


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) atomically.

    Raises:
        UserError: the disk is full or cannot be written to; the checkpoint before this one stays.
    """
    with atomic_file(path) as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # torch closes its archive on the way out of a full disk and hides the reason behind its own complaint.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path) -> dict[str, Any]:
    """The state at `path`.

    Raises:
        UserError: the file is damaged or holds anything but plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise UserError(
            f"{path}: checkpoint cannot be read ({type(error).__name__}); delete it to start over"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of otcclip")
    return state


def write_history(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """`history.jsonl`, a line an epoch. Raises UserError on a full disk."""
    write_text(folder / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def save_run(path: Path, trainer: Trainer, history: History, **about: str) -> None:
    """Write a run as it stands: trainer, history, and what tells the run (`about`). Errors as `save_state`."""
    save_state(path, {**trainer.state_dict(), "history": json.dumps(history), **about})


def restore_run(path: Path, trainer: Trainer, state: dict[str, Any]) -> History:
    """Put the trainer where `state`, read from `path`, has it; the history until then.

    Raises:
        UserError: parts are missing, or are of another model.
    """
    try:
        trainer.load_state_dict(state)
        return list(json.loads(state["history"]))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: checkpoint lacks parts or does not fit; delete it to start over") from error
