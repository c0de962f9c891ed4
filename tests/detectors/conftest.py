"""Small pair features with a known answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures
from otcclip.models import Features
from otcclip.transport import FeatureSets


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pair_features(
    n: int,
    classes: int = 8,
    *,
    seed: int = 0,
    noise: float = 0.35,
    wrong: tuple[int, ...] = (),
    prefix: str = "pair",
    reference: PairFeatures | None = None,
) -> PairFeatures:
    """`n` pairs of `classes` things in turn: images and captions near the thing's direction; `wrong` rows carry the
    caption of the thing half the circle away. Nine patches, two to four tokens."""
    rng = torch.Generator().manual_seed(seed)
    axes = unit(classes, 24, seed=99)
    thing = torch.arange(n) % classes
    said = thing.clone()
    said[list(wrong)] = (thing[list(wrong)] + classes // 2) % classes

    def near(which: torch.Tensor, spread: float) -> torch.Tensor:
        return F.normalize(axes[which] + spread * torch.randn(len(which), 24, generator=rng) / 24**0.5, dim=-1)

    patches = torch.stack([near(thing, noise) for _ in range(9)], dim=1)
    sizes = (torch.arange(n) % 3 + 2).tolist()
    tokens = [torch.stack([near(said[i : i + 1], 0.1)[0] for _ in range(sizes[i])]) for i in range(n)]
    # One caption, one vector: as an encoder would give it.
    words = [f"thing{int(s)} of kind{int(s) % 3} no{i // classes % 5}" for i, s in enumerate(said)]
    text = torch.stack([near(said[i : i + 1], 0.1)[0] for i in range(n)])
    first: dict[str, int] = {}
    for i, caption in enumerate(words):
        j = first.setdefault(caption, i)
        text[i], tokens[i] = text[j], tokens[j]
    draw = np.random.default_rng(seed)
    return PairFeatures(
        tuple(f"{prefix}-{i}" for i in range(n)),
        tuple(words),
        Features(F.normalize(patches.mean(1), dim=-1), FeatureSets.from_dense(patches)),
        Features(text, FeatureSets.from_list(tokens)),
        tuple(f"{prefix}{i:060x}" for i in range(n)),
        draw.integers(0, 2**63, n, dtype=np.uint64),
        reference=reference,
    )


@pytest.fixture(scope="session")
def make_features() -> Callable[..., PairFeatures]:
    return pair_features
