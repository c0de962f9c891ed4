"""A tiny `node_modules` as the emoji packages lay it out, the spec that fits, and a corpus built from it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otcclip.data import EmojiCorpus, build_emoji, read_shard
from otcclip.data.emoji_spec import FLUENT_3D, NAMES_PACKAGE, EmojiSpec, Package

GROUPS = {"0": "animals-nature", "1": "people-body", "2": "component", "8": "symbols", "9": "flags"}
EMOJIS = [
    ("1F43B-200D-2744-FE0F", "polar bear", ["animal", "arctic"], 0),
    ("23F0", "alarm clock", ["clock"], 0),
    ("1F45E", "man’s shoe", ["shoe"], 1),
    ("1FA85", "piñata", [], 1),
    ("1F449", "backhand index pointing right", ["finger"], 1),
    ("1F1EB-1F1F7", "flag: France", ["FR"], 9),
    ("2B1B", "black large square", ["square"], 8),
    ("1F3FB", "light skin tone", ["skin"], 2),  # a component: no pair
    ("1F1E6", "regional indicator A", ["a"], None),  # no group: no pair
]
VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "fxemoji": "1.2.2",
}
SPEC = EmojiSpec(
    version=1,
    packages=(
        Package(NAMES_PACKAGE, "17.0.0", credit="somebody"),
        *(Package(f"@iconify-json/{style}", version, style) for style, version in VERSIONS.items()),
        Package(FLUENT_3D, "1.1.0", "fluent3d", "somebody else"),
    ),
    pairs=18,
    names=7,
    plain_pairs=16,
    plain_names=5,
    shard_pairs=5,
)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def _square(colour: str, x: int = 0) -> dict[str, str]:
    return {"body": f'<rect x="{x}" width="32" height="64" fill="{colour}"/>'}


def _style(root: Path, style: str, icons: dict, aliases: dict | None = None, chars: dict | None = None) -> None:
    folder = root / "@iconify-json" / style
    _write(folder / "package.json", {"version": VERSIONS[style], "license": "MIT"})
    licence = {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/by"}
    _write(
        folder / "info.json",
        {"license": licence, "author": {"name": f"{style} people", "url": "https://a.b"}},
    )
    _write(folder / "icons.json", {"icons": icons, "aliases": aliases or {}, "width": 64, "height": 64})
    if chars is not None:
        _write(folder / "chars.json", chars)


def write_tree(root: Path) -> Path:
    """18 pairs: noto 3, noto-v1 2, twemoji 7, fluent-emoji-flat 2, fxemoji 2, fluent3d 2."""
    names = root / NAMES_PACKAGE
    _write(names / "package.json", {"version": "17.0.0", "license": "MIT"})
    _write(names / "meta" / "groups.json", {"groups": GROUPS})
    rows = [
        {"hexcode": code, "label": label, "tags": tags} | ({} if group is None else {"group": group})
        for code, label, tags, group in EMOJIS
    ]
    _write(names / "en" / "data.json", rows)
    # By hexcode without FE0F, by alias of a slug, and by a slug alone; the rest leads nowhere.
    _style(
        root,
        "noto",
        {
            "a-bear": _square("red"),
            "clock": _square("blue"),
            "pinata": _square("gold"),
            "skin-tone": _square("tan"),
        },
        {"alarm-clock": {"parent": "clock-2"}, "clock-2": {"parent": "clock"}, "loop": {"parent": "loop"}},
        {"1f43b-200d-2744": "a-bear", "1f3fb": "skin-tone", "1f45e": "not-there", "1f449": "loop"},
    )
    _style(root, "noto-v1", {"mans-shoe": _square("red"), "polar-bear": _square("blue")})
    every = {f"e{i}": _square("green") for i in range(9)}
    chars = {code.lower(): f"e{i}" for i, (code, *_) in enumerate(EMOJIS)}
    _style(root, "twemoji", every, {}, chars)
    right = {"backhand-index-pointing-right": {"parent": "left", "hFlip": True}}
    _style(root, "fluent-emoji-flat", {"left": _square("red"), "polar-bear": _square("red")}, right)
    _style(root, "fxemoji", {"alarmclock": _square("red"), "polarbear": _square("red")})
    assets = root / FLUENT_3D / "assets"
    _write(root / FLUENT_3D / "package.json", {"version": "1.1.0", "license": "MIT"})
    assets.mkdir()
    for code in ("1f43b-200d-2744-fe0f", "23f0", "1f43b-1f3fb"):
        Image.new("RGBA", (128, 128), (0, 0, 0, 0)).save(assets / f"{code}.webp")
    return root


@pytest.fixture(scope="session")
def spec() -> EmojiSpec:
    return SPEC


@pytest.fixture(scope="session")
def make_tree() -> Callable[[Path], Path]:
    return write_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages that tests only read."""
    return write_tree(tmp_path_factory.mktemp("npm") / "node_modules")


@pytest.fixture(scope="session")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that tests only read."""
    folder = tmp_path_factory.mktemp("built") / "emoji"
    build_emoji(folder, node_modules=tree, spec=SPEC)
    return folder


@pytest.fixture
def corpus(built: Path, tmp_path: Path) -> Path:
    """A corpus of the test's own."""
    return Path(shutil.copytree(built, tmp_path / "emoji"))


@pytest.fixture(scope="session")
def build() -> Callable[..., EmojiCorpus]:
    """`build_emoji` from a tree, without npm."""

    def run(folder: Path, tree: Path, **changed: object) -> EmojiCorpus:
        return build_emoji(folder, **({"node_modules": tree, "spec": SPEC} | changed))  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def pixels() -> Callable[[Path, str], np.ndarray]:
    """The stored image of a key."""

    def read(folder: Path, key: str) -> np.ndarray:
        rows = pq.read_table(folder / "index.parquet").to_pylist()
        shard = next(row["shard"] for row in rows if row["key"] == key)
        image = next(pair.image for pair in read_shard(folder / shard) if pair.key == key)
        return np.asarray(Image.open(io.BytesIO(image)))

    return read
