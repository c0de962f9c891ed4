"""The emoji corpus, from a tiny npm tree through the real builder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from otcclip.data import EmojiCorpus, build_emoji, emoji, emoji_icons, npm, read_shard
from otcclip.data.emoji_spec import EMOJI, EmojiSpec
from otcclip.errors import UserError

Build = Callable[..., EmojiCorpus]
Pixels = Callable[[Path, str], np.ndarray]
MakeTree = Callable[[Path], Path]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# The recipe


def test_which_icon_stands_for_which_emoji(built: Path) -> None:
    keys = pq.read_table(built / "index.parquet")["key"].to_pylist()
    assert keys == sorted(keys)
    assert [k for k in keys if not k.startswith("twemoji")] == [
        "fluent-emoji-flat_1f43b-200d-2744-fe0f",
        "fluent-emoji-flat_1f449",
        "fluent3d_1f43b-200d-2744-fe0f",
        "fluent3d_23f0",
        "fxemoji_1f43b-200d-2744-fe0f",
        "fxemoji_23f0",
        "noto-v1_1f43b-200d-2744-fe0f",
        "noto-v1_1f45e",
        "noto_1f43b-200d-2744-fe0f",
        "noto_1fa85",
        "noto_23f0",
    ]
    assert sum(k.startswith("twemoji") for k in keys) == 7


def test_images_are_64_px_on_white(built: Path, pixels: Pixels) -> None:
    bear = pixels(built, "noto_1f43b-200d-2744-fe0f")
    assert bear.shape == (64, 64, 3)
    assert tuple(bear[0, 0]) == (255, 0, 0)
    assert tuple(bear[0, 63]) == (255, 255, 255)
    assert (pixels(built, "fluent3d_23f0") == 255).all()


def test_an_alias_flips_its_parent(built: Path, pixels: Pixels) -> None:
    pointing = pixels(built, "fluent-emoji-flat_1f449")
    assert tuple(pointing[0, 0]) == (255, 255, 255)
    assert tuple(pointing[0, 63]) == (255, 0, 0)


def test_slugs() -> None:
    assert emoji_icons.slug("man’s shoe") == emoji_icons.slug("man's shoe") == "mans-shoe"
    assert emoji_icons.slug("flag: Côte d’Ivoire") == "flag-cote-divoire"
    assert emoji_icons.slug("Bosnia & Herzegovina") == "bosnia-and-herzegovina"


def test_index_captions_and_hashes_agree_with_the_shards(built: Path) -> None:
    rows = {row["key"]: row for row in pq.read_table(built / "index.parquet").to_pylist()}
    assert rows["noto_1f43b-200d-2744-fe0f"]["caption"] == "polar bear | animal, arctic"
    assert rows["noto_1fa85"]["caption"] == "piñata"  # no tags
    assert set(rows["noto_23f0"]) == set(emoji.INDEX_COLUMNS)
    found = {}
    for shard in sorted(built.glob("*.tar")):
        for pair in read_shard(shard):
            found[pair.key] = pair
            row = rows[pair.key]
            assert row["shard"] == shard.name
            assert row["sha256"] == hashlib.sha256(pair.image).hexdigest()
            assert (row["caption"], row["name"]) == (pair.caption, pair.label)
            assert (row["style"], row["group"]) == (pair.metadata["source"], pair.metadata["group"])
    assert set(found) == set(rows)
    assert len(list(built.glob("*.tar"))) == 4  # 18 pairs, 5 a shard


def test_the_card_names_every_package_and_licence(built: Path, spec: EmojiSpec) -> None:
    card = json.loads((built / "card.json").read_text("utf-8"))
    assert card["counts"] == {"pairs": 18, "names": 7, "plain_pairs": 16, "plain_names": 5}
    assert {(p["name"], p["version"]) for p in card["packages"]} == {(p.name, p.version) for p in spec.packages}
    text = (built / "card.md").read_text("utf-8")
    for package in spec.packages:
        assert f"| {package.name} | {package.version} |" in text
    assert "[CC-BY-4.0](https://example.org/by) | noto people, https://a.b" in text
    assert "| MIT | somebody else" in text


# Whole or not at all


def test_the_same_bytes_each_time(
    built: Path, tree: Path, tmp_path: Path, build: Build, spec: EmojiSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "again", tree)
    assert contents(tmp_path / "again") == contents(built)
    monkeypatch.setattr(emoji_icons, "decode_image", lambda *_: pytest.fail("drawn in this process"))
    build_emoji(tmp_path / "side by side", node_modules=tree, spec=spec, workers=2)
    assert contents(tmp_path / "side by side") == contents(built)


def test_a_complete_corpus_is_reused(corpus: Path, monkeypatch: pytest.MonkeyPatch, spec: EmojiSpec) -> None:
    monkeypatch.setattr(npm, "install", lambda *_: pytest.fail("installed"))
    before = contents(corpus)
    result = build_emoji(corpus, spec=spec)
    assert result.reused
    assert (result.pairs, result.plain_names) == (18, 5)
    assert contents(corpus) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "00001.tar").unlink(),
        lambda f: (f / "00001.tar").write_bytes((f / "00001.tar").read_bytes()[:-1]),
        lambda f: (f / "index.parquet").write_bytes(b"PAR1"),
        lambda f: (f / "card.json").write_text((f / "card.json").read_text().replace("1.2.9", "1.2.8")),
        lambda f: (f / "card.json").write_text('{"corpus": "otcclip-emoji"}'),
    ],
)
def test_a_damaged_or_other_corpus_is_rebuilt(
    damage: object, corpus: Path, built: Path, tree: Path, build: Build
) -> None:
    damage(corpus)  # type: ignore[operator]
    assert not build(corpus, tree).reused
    assert contents(corpus) == contents(built)


def test_another_version_is_rebuilt(corpus: Path, tree: Path, spec: EmojiSpec, build: Build) -> None:
    assert not build(corpus, tree, spec=replace(spec, version=2)).reused
    assert json.loads((corpus / "card.json").read_text())["version"] == 2


def test_a_foreign_folder_is_never_replaced(tmp_path: Path, tree: Path, build: Build) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no emoji corpus"):
        build(tmp_path, tree)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    assert build(tmp_path / "empty", tree).pairs == 18


@pytest.mark.parametrize("at", [0, 7, 17])
def test_an_exception_halfway_leaves_nothing(
    at: int, tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    draw, drawn = emoji_icons.draw, iter(range(100))

    def failing(drawing: emoji_icons.Drawing) -> object:
        if next(drawn) == at:
            raise KeyboardInterrupt
        return draw(drawing)

    monkeypatch.setattr(emoji, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "emoji", tree)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    at: int, tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, build: Build
) -> None:
    fsync, calls = os.fsync, iter(range(100))

    def failing(descriptor: int) -> None:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match="No space left on device") as error:
        build(tmp_path / "emoji", tree)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Packages


def test_a_missing_package_is_named(tmp_path: Path, build: Build, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "node_modules")
    shutil.rmtree(tree / "@iconify-json" / "fxemoji")
    with pytest.raises(UserError, match=r"@iconify-json/fxemoji@1\.2\.2 is missing"):
        build(tmp_path / "emoji", tree)
    assert not (tmp_path / "emoji").exists()


def test_another_version_is_named(tmp_path: Path, build: Build, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "node_modules")
    (tree / "emojibase-data" / "package.json").write_text('{"version": "16.0.0"}')
    with pytest.raises(UserError, match=r"emojibase-data: version 17\.0\.0 is needed, found 16\.0\.0"):
        build(tmp_path / "emoji", tree)


def test_a_broken_file_of_a_package_is_named(tmp_path: Path, build: Build, make_tree: MakeTree) -> None:
    tree = make_tree(tmp_path / "node_modules")
    (tree / "@iconify-json" / "noto" / "icons.json").write_text("{")
    with pytest.raises(UserError, match=r"noto/icons\.json"):
        build(tmp_path / "emoji", tree)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_picture_that_cannot_be_drawn_is_named(
    tmp_path: Path, build: Build, make_tree: MakeTree, workers: int
) -> None:
    tree = make_tree(tmp_path / "node_modules")
    (tree / "@lobehub/fluent-emoji-3d/assets/23f0.webp").write_bytes(b"RIFF")
    with pytest.raises(UserError, match="fluent3d: cannot draw 'alarm clock'"):
        build(tmp_path / "emoji", tree, workers=workers)
    assert not (tmp_path / "emoji").exists()


def test_counts_that_do_not_come_out(tmp_path: Path, tree: Path, spec: EmojiSpec, build: Build) -> None:
    with pytest.raises(UserError, match="pairs 18 instead of 19, plain_names 5 instead of 6"):
        build(tmp_path / "emoji", tree, spec=replace(spec, pairs=19, plain_names=6))
    assert list(tmp_path.iterdir()) == []


def test_the_real_spec_is_the_one_of_the_reference_task() -> None:
    assert (EMOJI.pairs, EMOJI.names, EMOJI.plain_pairs, EMOJI.plain_names) == (12_971, 1_914, 10_394, 1_420)
    assert len(EMOJI.styles) == 10
