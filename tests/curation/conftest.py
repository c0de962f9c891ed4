"""Shards of small structured pictures, some under three captions they do not deserve, and an encoder
that needs no weights."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from otcclip.curation import Rule, Scan, ScanOptions
from otcclip.data import Pair, PairStore, write_shard
from otcclip.models import Features
from otcclip.transport import FeatureSets

# Of 96 captions, four a thing, none can be as certain or stand as clearly first as the default levels ask.
LEVELS = Rule(alpha=0.1, seconded=4.0)
WRONG = tuple(range(5, 480, 10))


class ToyEncoder:
    """Colours of a 4 x 4 grid; captions as hashed words. Image and text share no space."""

    name, image_size, joint, local = "toy", 64, False, False

    def __init__(self) -> None:
        self.seen = 0

    def images(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        cells = F.adaptive_avg_pool2d(images.float() / 255 - 0.5, 4).flatten(2).transpose(1, 2)
        # No two pictures are near-duplicates to it: a little of each picture's own, drawn by its pixels' sum.
        own = [torch.randn(16, 3, generator=torch.Generator().manual_seed(int(x.sum()))) for x in images.int()]
        cells = cells + 0.04 * torch.stack(own)
        wide = (torch.eye(16)[None, :, :, None] * cells[:, :, None]).flatten(2)  # a cell's place is part of its vector
        return Features(F.normalize(wide.sum(1), dim=-1), FeatureSets.from_dense(F.normalize(wide, dim=-1)))

    def captions(self, captions: Sequence[str]) -> Features:
        codes = [sum(map(ord, caption)) % 97 for caption in captions]
        vectors = torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(code)) for code in codes])
        vectors = F.normalize(vectors, dim=1)
        return Features(vectors, FeatureSets.from_dense(vectors[:, None]))

    def identity(self) -> dict[str, str]:
        return {"model": "toy"}


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def encoder() -> ToyEncoder:
    return ToyEncoder()


@pytest.fixture(scope="session")
def pairs(make_store: Callable[..., PairStore]) -> list[Pair]:
    """480 pairs of 24 things; those at WRONG carry another thing's caption."""
    store = make_store(480, 24)
    captions = [f"{name} style{i // 24 % 4}" for i, name in enumerate(store.labels)]
    for i in WRONG:
        captions[i] = f"{store.labels[2 * (i // 160)]} style0"  # an even thing; the pictures are of odd ones
    return [
        Pair(store.keys[i], png(store.images[i]), captions[i], store.labels[i], {"uid": f"{i:032x}"})
        for i in range(len(store))
    ]


@pytest.fixture(scope="session")
def shards(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 120 pairs; tests only read them."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(4):
        write_shard(folder / f"{i:05d}.tar", pairs[120 * i : 120 * (i + 1)])
    return folder


@pytest.fixture
def scan(shards: Path, tmp_path: Path) -> Scan:
    return Scan.run(shards, ToyEncoder(), tmp_path / "scan", ScanOptions(rule=LEVELS))


@pytest.fixture
def make_tar() -> Callable[[Path, Sequence[tuple[str, bytes]]], Path]:
    """A tar of members as given, in order, nothing checked."""

    def make(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


@pytest.fixture
def options() -> Callable[..., ScanOptions]:
    return ScanOptions
