"""Training state on disk: written whole or not at all, read without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from otcclip.data.atomic import atomic_file
from otcclip.errors import UserError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) atomically."""
    with atomic_file(path) as handle:
        torch.save(state, handle)


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
