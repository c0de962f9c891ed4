"""Feature sets on disk, read where they lie: a folder of plain .npy files that opens memory-mapped.

    save(sets, "pool/")          # values.npy, offsets.npy, weights.npy if any
    pool = load("pool/")         # nothing is read until it is used
    nearest(queries, pool)

numpy knows no bfloat16: such values are stored as their 16 bits under the name `values.bfloat16.npy`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otcclip.transport.problem import FeatureSets

_VALUES, _BFLOAT16, _OFFSETS, _WEIGHTS = "values.npy", "values.bfloat16.npy", "offsets.npy", "weights.npy"


def save(sets: FeatureSets, folder: str | Path) -> None:
    """Write the sets to `folder`, which is made if need be.

    Raises:
        FileExistsError: the folder holds feature sets already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).exists() for name in (_VALUES, _BFLOAT16)):
        raise FileExistsError(f"folder: {folder} holds feature sets already")
    values = sets.values.detach().cpu()
    if sets.weights is not None:
        np.save(folder / _WEIGHTS, sets.weights.detach().cpu().float().numpy())
    np.save(folder / _OFFSETS, sets.offsets.numpy())
    if values.dtype == torch.bfloat16:
        np.save(folder / _BFLOAT16, values.view(torch.int16).numpy())
    else:
        np.save(folder / _VALUES, values.numpy())


def load(folder: str | Path) -> FeatureSets:
    """The sets in `folder`; values stay on disk and are paged in as they are read.

    Raises:
        FileNotFoundError: no feature sets there.
        ValueError: the files do not fit one another (see `FeatureSets`).
    """
    folder = Path(folder)
    offsets = torch.from_numpy(np.load(folder / _OFFSETS, allow_pickle=False))
    half = (folder / _BFLOAT16).exists()
    values = _mapped(folder / (_BFLOAT16 if half else _VALUES))
    weights = _mapped(folder / _WEIGHTS) if (folder / _WEIGHTS).exists() else None
    return FeatureSets(values.view(torch.bfloat16) if half else values, offsets, weights)


def _mapped(path: Path) -> Tensor:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    with warnings.catch_warnings():
        # torch warns that the memory is read-only; nothing in this room writes to a set's values.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
