"""What the tests of several rooms share: small pictures with structure, and a small emoji corpus on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from otcclip.data import PairStore, build_emoji
from otcclip.data.emoji_spec import NAMES_PACKAGE, EmojiSpec, Package

# fmt: off
NAMES = (
    "polar bear", "banana", "red apple", "ice cream", "alarm clock", "violin", "rocket", "umbrella", "cactus",
    "octopus", "teapot", "lantern", "bicycle", "mushroom", "penguin", "castle", "anchor", "scissors", "guitar",
    "pumpkin", "tractor", "dolphin", "candle", "hammer", "balloon", "snail", "volcano", "tent", "compass", "broom",
    "magnet", "parrot",
)
TAGS = (
    "big", "small", "old", "new", "quiet", "loud", "warm", "cold", "round", "flat", "bright", "dark", "plain",
    "fancy", "cheap", "rare",
)
# fmt: on
STYLES = ("noto", "noto-v1", "twemoji", "openmoji", "emojione", "fxemoji")


def structured_store(
    n: int, classes: int, *, own_caption: bool = False, size: int = 64, seed: int = 0, noise: float = 8.0
) -> PairStore:
    """`n` pictures of `classes` things (at most 32) in turn: each thing a coarse pattern, each picture a little
    shifted, tinted and noisy. Captions name the thing; with `own_caption` two tags make each caption its own.
    """
    rng = np.random.default_rng(seed)
    pattern = rng.uniform(0, 255, (classes, 8, 8, 3)).repeat(size // 8, 1).repeat(size // 8, 2)
    kind = np.arange(n) % classes
    images = np.empty((n, size, size, 3), np.uint8)
    for i, thing in enumerate(kind):
        moved = np.roll(pattern[thing], tuple(rng.integers(-3, 4, 2)), (0, 1))
        tinted = moved * rng.uniform(0.8, 1.1) + rng.uniform(-15, 15, 3) + rng.normal(0, noise, moved.shape)
        images[i] = tinted.clip(0, 255).astype(np.uint8)
    labels = tuple(NAMES[thing] for thing in kind)
    rounds = np.arange(n) // classes
    captions = [
        f"{name} | {TAGS[r % 16]}, {TAGS[(r // 16 + r + 5) % 16]}" if own_caption else name
        for name, r in zip(labels, rounds, strict=True)
    ]
    return PairStore(tuple(f"pair-{i:04d}" for i in range(n)), images, tuple(captions), labels)


@pytest.fixture
def quiet() -> Iterator[None]:
    """A run silences the root logger and sets the threads of its process, which here is everybody's."""
    level, threads = logging.getLogger().level, torch.get_num_threads()
    yield
    logging.getLogger().setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_store() -> Callable[..., PairStore]:
    return structured_store


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def _tree(root: Path) -> Path:
    """The npm packages of 24 names in six styles: a disc and a bar, coloured by name, a little by style."""
    names = NAMES[:24]
    codes = [f"1F{i + 0x400:03X}" for i in range(len(names))]
    _write(root / NAMES_PACKAGE / "package.json", {"version": "1.0.0", "license": "MIT"})
    _write(root / NAMES_PACKAGE / "meta" / "groups.json", {"groups": {"0": "objects", "8": "symbols", "9": "flags"}})
    rows = [
        {"hexcode": code, "label": name, "tags": [TAGS[i % 16]], "group": 0}
        for i, (code, name) in enumerate(zip(codes, names, strict=True))
    ]
    extra = [
        {"hexcode": f"2B{i:02X}", "label": f"sign {i}", "tags": [], "group": group} for i, group in ((0, 8), (1, 9))
    ]
    _write(root / NAMES_PACKAGE / "en" / "data.json", rows + extra)
    rng = np.random.default_rng(0)
    place = rng.integers(8, 56, (len(names), 4))
    tint = rng.integers(0, 255, (len(names), 3))
    for s, style in enumerate(STYLES):
        folder = root / "@iconify-json" / style
        icons = {}
        for i, name in enumerate([*names, "sign 0", "sign 1"]):
            j = i % len(names)
            x, y, u, v = place[j] + s
            colour = "#{:02x}{:02x}{:02x}".format(*(int(c) for c in (tint[j] + 5 * s) % 256))
            body = (
                f'<circle cx="{x}" cy="{y}" r="{14 + s}" fill="{colour}"/><rect x="{u}" y="{v}" width="20" height="6"/>'
            )
            icons[name.replace(" ", "-")] = {"body": body}
        _write(folder / "package.json", {"version": "1.0.0", "license": "MIT"})
        _write(folder / "info.json", {"license": {"title": "MIT", "spdx": "MIT"}, "author": {"name": "nobody"}})
        _write(folder / "icons.json", {"icons": icons, "width": 64, "height": 64})
    return root


@pytest.fixture(scope="session")
def small_emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emoji corpus of 24 names in six styles, built from fake packages; tests only read it."""
    root = tmp_path_factory.mktemp("small-emoji")
    packages = (
        Package(NAMES_PACKAGE, "1.0.0", credit="nobody"),
        *(Package(f"@iconify-json/{style}", "1.0.0", style) for style in STYLES),
    )
    spec = EmojiSpec(1, packages, pairs=156, names=26, plain_pairs=144, plain_names=24, shard_pairs=100)
    build_emoji(root / "emoji", node_modules=_tree(root / "node_modules"), spec=spec)
    return root / "emoji"
