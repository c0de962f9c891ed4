"""Success of a label swap in retrieval: does a text of class B bring up images of class A?

Yang et al., "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023, arXiv 2209.15266: Hit@K, the share of B's
texts with an image of A among the first K images, and MinRank, the best place of an image of A, each beside the same
for texts drawn at random: a class that every text brings up has not been taught by any poison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from otcclip.evaluation.intervals import Rate

Classes = NDArray[np.int64] | Sequence[int]


@dataclass(frozen=True)
class Places:
    """Where the images wanted come in the answers to some texts; `min_rank` is a mean, 1 the first place."""

    hit_at_1: Rate
    hit_at_5: Rate
    hit_at_10: Rate
    min_rank: float


@dataclass(frozen=True)
class SwapSuccess:
    """`swapped`: asked with texts of B. `random`: asked with as many texts of other classes than A and B."""

    swapped: Places
    random: Places


@torch.no_grad()
def swap_success(
    image_features: Tensor,
    image_class: Classes,
    text_features: Tensor,
    text_class: Classes,
    swaps: Sequence[tuple[int, int]],
    seed: int = 0,
) -> SwapSuccess:
    """Places of images of A in the answers to texts of B, over all `swaps` (A, B).

    Args:
        image_features: `[n, d]`, the images that answer. image_class: `[n]`.
        text_features: `[m, d]`, the texts that ask. text_class: `[m]`. Neither need be unit.
        swaps: classes seen and said; each has an image of A, a text of B, and a text of neither.
        seed: draws the random texts.

    Raises:
        ValueError: lengths that don't fit, no swap, or one without such images or texts.
    """
    seen_class, said_class = np.asarray(image_class), np.asarray(text_class)
    if seen_class.shape != (len(image_features),) or said_class.shape != (len(text_features),) or not swaps:
        raise ValueError(f"swaps: {len(swaps)}, images: {len(image_features)}, texts: {len(text_features)}")
    images, texts = (F.normalize(f.detach().float().cpu(), dim=-1) for f in (image_features, text_features))
    scores = (texts @ images.T).numpy()
    rng = np.random.default_rng(seed)
    swapped, random = [], []
    for seen, said in swaps:
        asked = np.flatnonzero(said_class == said)
        others = np.flatnonzero((said_class != said) & (said_class != seen))
        shown = seen_class == seen
        if not (len(asked) and len(others) and shown.any()):
            raise ValueError(f"swap {seen} to {said}: needs an image of {seen}, a text of {said} and one of neither")
        swapped.append(_best_places(scores[asked], shown))
        drawn = rng.choice(others, len(asked), replace=len(others) < len(asked))
        random.append(_best_places(scores[drawn], shown))
    return SwapSuccess(_places(np.concatenate(swapped)), _places(np.concatenate(random)))


def _best_places(scores: NDArray[np.float32], shown: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each text (a row) the place, from 1, of the best image `shown`; another at the same score goes before it."""
    best = scores[:, shown].max(axis=1, keepdims=True)
    places: NDArray[np.int64] = 1 + (scores[:, ~shown] >= best).sum(axis=1)
    return places


def _places(rank: NDArray[np.int64]) -> Places:
    return Places(Rate.over(rank <= 1), Rate.over(rank <= 5), Rate.over(rank <= 10), float(rank.mean()))
