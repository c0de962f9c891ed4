"""Training state on disk: written whole or not at all, read without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from otcclip.data.atomic import atomic_file
from otcclip.errors import UserError


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
