"""The split and its cache; the real corpus only where this machine has built it."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from otcclip.data import EmojiCorpus, build_emoji, emoji, emoji_load, load_emoji
from otcclip.data.emoji_spec import EMOJI, EmojiSpec
from otcclip.errors import UserError

Build = Callable[..., EmojiCorpus]
Pixels = Callable[[Path, str], np.ndarray]
MakeTree = Callable[[Path], Path]


# The split


def test_the_style_held_out_is_the_test_part(corpus: Path) -> None:
    split = load_emoji(corpus, 48)
    assert set(split.test.sources) == {"twemoji"}
    assert len(split.test) == 5  # without a flag and a symbol
    assert len(split.train) == 11
    assert "twemoji" not in split.train.sources
    assert split.train.images.shape == (11, 48, 48, 3)
    assert list(split.train.keys) == sorted(split.train.keys)
    assert split.names == tuple(sorted(set(split.train.labels) | set(split.test.labels)))
    assert split.train.captions[split.train.keys.index("noto_1f43b-200d-2744-fe0f")] == "polar bear | animal, arctic"
    assert (split.hold_out, split.left_out) == ("twemoji", ())


def test_images_stand_with_their_keys(corpus: Path, pixels: Pixels) -> None:
    split = load_emoji(corpus, 64, "noto")
    for part in (split.train, split.test):
        for key, image in zip(part.keys, part.images, strict=True):
            assert np.array_equal(image, pixels(corpus, key))


@pytest.mark.parametrize(
    ("style", "sibling"),
    [
        ("noto", "noto-v1"),
        ("noto-v1", "noto"),
        ("fluent3d", "fluent-emoji-flat"),
        ("fluent-emoji-flat", "fluent3d"),
    ],
)
def test_a_near_sibling_is_in_neither_part(style: str, sibling: str, corpus: Path) -> None:
    split = load_emoji(corpus, 8, style)
    assert set(split.test.sources) == {style}
    assert not {style, sibling} & set(split.train.sources)
    assert split.left_out == (sibling,)


def test_groups_can_be_kept(corpus: Path) -> None:
    split = load_emoji(corpus, 8, groups_excluded=())
    assert len(split.train) + len(split.test) == 18
    with pytest.raises(UserError, match="unknown group 'flag': choose from animals-nature, flags"):
        load_emoji(corpus, 8, groups_excluded=("flag",))


def test_hold_out_is_recorded_and_may_be_overruled(corpus: Path, spec: EmojiSpec) -> None:
    assert build_emoji(corpus, hold_out="noto", spec=spec).reused
    assert json.loads((corpus / "split.json").read_text()) == {
        "hold_out": "noto",
        "left_out_of_training": ["noto-v1"],
    }
    assert load_emoji(corpus, 8).hold_out == "noto"
    assert load_emoji(corpus, 8, "fxemoji").hold_out == "fxemoji"
    assert build_emoji(corpus, spec=spec).hold_out == "noto"  # who names no style changes nobody's default
    assert load_emoji(corpus, 8).hold_out == "noto"
    (corpus / "split.json").write_text("{")
    assert load_emoji(corpus, 8).hold_out == "twemoji"


def test_an_unknown_style_lists_the_styles(corpus: Path, tmp_path: Path, tree: Path, build: Build) -> None:
    for use in (
        lambda: load_emoji(corpus, 8, "apple"),
        lambda: build(tmp_path / "new", tree, hold_out="apple"),
    ):
        with pytest.raises(
            UserError, match="unknown style 'apple': choose one of fluent-emoji-flat, fluent3d, fxemoji"
        ):
            use()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [0, -1, 5000])
def test_image_sizes_out_of_range(size: int, corpus: Path) -> None:
    with pytest.raises(UserError, match="image size"):
        load_emoji(corpus, size)


def test_no_corpus_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="otcclip corpus emoji --out"):
        load_emoji(tmp_path, 48)


# The cache


def test_the_second_load_decodes_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_emoji(corpus, 48)
    monkeypatch.setattr(emoji_load, "decode_image", lambda *_: pytest.fail("decoded"))
    second = load_emoji(corpus, 48)
    assert np.array_equal(first.train.images, second.train.images)
    assert second.train.keys == first.train.keys
    other = load_emoji(corpus, 48, "fxemoji")  # one cache for every split
    assert len(other.test) == 2


def test_a_cut_off_cache_is_made_again(corpus: Path) -> None:
    first = load_emoji(corpus, 16)
    cache = corpus / "cache" / "rgb16.npy"
    whole = cache.read_bytes()
    for broken in (whole[:-100], b"", b"junk"):
        cache.write_bytes(broken)
        assert np.array_equal(load_emoji(corpus, 16).test.images, first.test.images)
        assert cache.read_bytes() == whole


def test_a_full_disk_leaves_no_cache(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=r"rgb16\.npy: cannot write: No space left"):
        load_emoji(corpus, 16)
    assert list((corpus / "cache").iterdir()) == []


def test_images_that_are_not_the_indexed_ones_are_refused(corpus: Path) -> None:
    table = pq.read_table(corpus / "index.parquet")
    for column, values in (
        ("sha256", ["0" * 64] * 18),
        ("key", [f"x{i}" for i in range(18)]),
        ("shard", [*table["shard"].to_pylist()[:15], "00000.tar", "00000.tar", "00000.tar"]),
    ):
        at = table.schema.get_field_index(column)
        pq.write_table(table.set_column(at, column, [values]), corpus / "index.parquet")
        with pytest.raises(UserError, match="damaged corpus"):
            load_emoji(corpus, 8)
    (corpus / "index.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"index\.parquet cannot be read"):
        load_emoji(corpus, 8)
    assert not list(corpus.glob("cache/*"))


# The real corpus, where this machine has it

REAL = Path(os.environ.get("OTCCLIP_CORPUS", Path(__file__).parents[2] / "corpora" / "emoji"))


@pytest.mark.skipif(not (REAL / "card.json").exists(), reason="the real corpus is not built here")
def test_the_real_corpus_has_its_counts() -> None:
    card = emoji.read_card(REAL)
    assert card is not None
    if card["version"] != EMOJI.version:
        pytest.skip("the corpus built here is of another version")
    assert emoji._complete(REAL, card, EMOJI)
    rows = pq.read_table(REAL / "index.parquet", columns=["style", "name", "group", "key"]).to_pylist()
    plain = [row for row in rows if row["group"] not in ("symbols", "flags")]
    assert (len(rows), len({r["name"] for r in rows}), len({r["style"] for r in rows})) == (12_971, 1_914, 10)
    assert (len(plain), len({r["name"] for r in plain})) == (10_394, 1_420)
    if not (REAL / "cache" / "rgb48.npy").exists():
        return  # decoding it takes seconds; the demo does it
    started = time.monotonic()
    split = load_emoji(REAL, 48, "twemoji")
    assert time.monotonic() - started < 5  # memory-mapped: 0.2 s on a quiet machine
    assert (len(split.train), len(split.test), len(split.names)) == (8_974, 1_420, 1_420)
