"""Keys of any text go through a shard and come back, each with its own image; no member's name leaves its folder."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from otcclip.curation.units import Item
from otcclip.curation.writers import Mended, WebDatasetWriter
from otcclip.data import Pair, Skipped, load_store, read_shard, write_shard
from otcclip.data.names import is_plain, member_name
from otcclip.data.png import png
from otcclip.errors import UserError

ODD = [
    "im/0.png",
    "a.jpg",
    "a.png",
    "a",
    "/etc/passwd",
    "../../x",
    "a/../b",
    "a//b",
    "a/",
    "/",
    "",
    "%",
    "%25",
    "a%2Ejpg",
]
ODD += [
    ".",
    "..",
    "./a",
    "a\\b",
    "C:\\x",
    "a\nb",
    "\0",
    "\x9b2J",
    "a.b/c",
    "a.b/c.d",
    "é",
    "日本.png",
    "x" * 300,
    "=",
    " ",
]
PARTS = st.sampled_from(["a", "b", ".", "..", "/", "//", ".png", "%", "%2E", "\\", "\n", "\0", "./", "日", " "])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYS = st.lists(st.lists(PARTS, max_size=5).map("".join) | TEXT, min_size=1, max_size=8, unique=True)


def pairs_of(keys: list[str]) -> list[Pair]:
    return [Pair(key, f"image {i}".encode(), f"caption {i}", metadata={"n": str(i)}) for i, key in enumerate(keys)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(ODD)
@example(ODD[::-1])
@given(KEYS)
def test_any_key_comes_back_with_its_own_image(keys: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        write_shard(path, pairs_of(keys))
        skipped: list[Skipped] = []
        assert list(read_shard(path, on_skip=skipped.append)) == pairs_of(keys) and not skipped
        with tarfile.open(path) as archive:
            names = archive.getnames()
    assert len(set(names)) == 3 * len(keys)
    for name in names:
        assert not name.startswith("/") and ".." not in PurePosixPath(name).parts
        assert not {"\n", "\0", "\\"} & set(name)


@given(st.lists(TEXT | st.sampled_from(ODD), unique=True))
def test_no_two_keys_share_a_name(keys: list[str]) -> None:
    assert len({member_name(key) for key in keys}) == len(keys)
    assert all(is_plain(key) == (member_name(key) == key) for key in keys)


def test_plain_keys_are_written_as_ever(tmp_path: Path) -> None:
    keys = ["noto-1F43B_200D", "000000012", "part/7", "a.b/c", "grüße", "a b"]
    write_shard(tmp_path / "0.tar", [Pair(key, b"x", "c", "l", {"source": "noto"}) for key in keys])
    with tarfile.open(tmp_path / "0.tar") as archive:
        assert archive.getnames() == [f"{key}.{end}" for key in keys for end in ("json", "png", "txt")]
        handle = archive.extractfile("part/7.json")
        assert handle is not None and handle.read() == b'{"label": "l", "source": "noto"}'


def test_a_repaired_csv_can_be_read(tmp_path: Path) -> None:
    """A CSV's keys are paths; webdataset itself must find the three members of each, too."""
    import webdataset

    pairs = [Pair(f"im/{i}.png", png(PIXELS), f"caption {i}") for i in range(3)]
    writer = WebDatasetWriter(tmp_path)
    writer.write("u", iter([Mended(Item(pair, (0, 0)), f"new {i}", pair.caption) for i, pair in enumerate(pairs)]))
    store = load_store(tmp_path / "u.tar", 4)
    assert store.keys == ("im/0.png", "im/1.png", "im/2.png") and store.captions == ("new 0", "new 1", "new 2")
    samples = list(webdataset.WebDataset(str(tmp_path / "u.tar"), shardshuffle=False))
    assert [(s["txt"], len(s["png"]) > 0) for s in samples] == [(f"new {i}".encode(), True) for i in range(3)]


PIXELS = np.zeros((8, 8, 3), np.uint8)


def sample(name: str, **json_fields: object) -> list[tuple[str, bytes]]:
    fields = json.dumps(json_fields).encode()
    return [(f"{name}.png", png(PIXELS)), (f"{name}.txt", name.encode()), (f"{name}.json", fields)]


def test_a_json_that_claims_another_pairs_key(tmp_path: Path) -> None:
    members = sample("victim") + sample("thief", __key__="victim") + sample("liar", __key__="im/0.png")
    members += (
        sample("im%2F0%2Epng", __key__="im/0.png") + sample("odd", __key__=["x"]) + sample("same", __key__="same")
    )
    members += sample("half", __key__="\ud83d") + sample("im%2F0%2Epng", __key__="im/0.png")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    skipped: list[Skipped] = []
    found = list(read_shard(tmp_path / "0.tar", on_skip=skipped.append))
    assert [(pair.key, pair.caption) for pair in found] == [
        ("victim", "victim"),
        ("im/0.png", "im%2F0%2Epng"),
        ("odd", "odd"),
        ("same", "same"),
        ("im/0.png", "im%2F0%2Epng"),
    ]
    assert all("__key__" not in pair.metadata for pair in found)
    assert [(record.key, record.reason) for record in skipped] == [
        (key, "broken metadata") for key in ("thief", "liar", "half")
    ]
    assert load_store(tmp_path / "0.tar", 4, max_bad=0.9).keys == ("victim", "im/0.png", "odd", "same")


UNWRITABLE = [Pair("a\udcff", b"x", "c"), Pair("a.\ud83d", b"x", "c"), Pair("a", b"x", "\ud83d")]
UNWRITABLE += [Pair("a", b"", "c", "\udcff"), Pair("a", b"x", "c", None, {"__key__": "b"})]


@pytest.mark.parametrize("pair", UNWRITABLE)
def test_a_pair_that_cannot_be_written_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pair 'a\.?': [^\n]+$"):
        write_shard(tmp_path / "0.tar", [pair])
    assert list(tmp_path.iterdir()) == []
