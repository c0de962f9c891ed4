"""Who votes on whom: the defence's own measure of likeness (`otcclip.evidence`), in the hands of the attacker."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.evidence import neighbours
from otcclip.evidence.descriptors import descriptors, views
from otcclip.evidence.neighbours import NEAR_DUPLICATE, NEIGHBOURS


def look_alikes(images: NDArray[np.uint8], k: int = NEIGHBOURS) -> NDArray[np.int64]:
    """The `k` nearest of `images` `[n, H, W, 3]` to each, nearest first, near-duplicates left out: `[n, k]`.

    By the descriptor of the whole image; fewer columns where there are fewer images.
    """
    _, (_, nearest) = neighbours.near_duplicates(_vectors(images), k)
    return nearest.numpy()


def twins_among(copies: NDArray[np.uint8], source: NDArray[np.int64], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of `copies` `[m, H, W, 3]` are near-duplicates of an earlier copy of the same `source` `[m]`.

    `others` are honest images: vectors are centred on the mean of all.
    """
    vectors = _vectors(np.concatenate([copies, others]))[: len(copies)]
    same = torch.from_numpy(source[:, None] == source[None, :])
    # A hair below the threshold: the corpus's mean is estimated from a sample.
    close = ((vectors @ vectors.T).float() > NEAR_DUPLICATE - 0.01) & same
    return close.tril(-1).any(dim=1).numpy()


def _vectors(images: NDArray[np.uint8]) -> Tensor:
    shown = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    whole = next(view for view in views() if view.name == "whole")
    ((_, vectors),) = descriptors(shown, (whole,))
    return vectors
