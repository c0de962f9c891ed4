"""The index: any pair by number, bad ones counted and listed, made once, and nothing served that is no longer there."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from otcclip.data import Pair, decode_image, open_pairs, write_shard
from otcclip.data import index as index_module
from otcclip.data.images import DecodedOnDemand, fetch
from otcclip.data.keys import KeyIndex, hash_keys
from otcclip.data.manifest import read_manifest
from otcclip.data.readers import ReadOptions
from otcclip.data.table import FILES, PairTable, Row, TableBuilder
from otcclip.errors import UserError

SIZE = 16


def picture(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    handle = io.BytesIO()
    Image.fromarray(pixels).save(handle, "PNG")
    return handle.getvalue()


def pairs(keys: range, bad: tuple[int, ...] = ()) -> Iterator[Pair]:
    for i in keys:
        yield Pair(f"{i:04d}", b"\x89PNG\r\n\x1a\n broken" if i in bad else picture(i), f"caption {i % 7}", f"c{i % 3}")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    write_shard(tmp_path / "0.tar", pairs(range(40)))
    write_shard(tmp_path / "1.tar", pairs(range(40, 70)))
    return str(tmp_path / "{0..1}.tar")


@pytest.mark.parametrize("kept", [8.0, 0.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_pair_by_number(kept: float, workers: int, shards: str, tmp_path: Path) -> None:
    data = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache", decoded_gib=kept, workers=workers)
    assert isinstance(data.images, torch.Tensor) == bool(kept)
    assert data.table.keys == tuple(f"{i:04d}" for i in range(70)) and data.table.labels[4] == "c1"
    index = torch.tensor([69, 0, 41, 41, 7])
    expected = [decode_image(picture(int(i)), SIZE) for i in index]
    got = data.images[index]
    assert got.dtype == torch.uint8 and np.array_equal(got.permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert torch.equal(torch.cat(list(data.images.split(32))), data.images[torch.arange(70)])
    names, number = data.table.caption_numbers()
    assert tuple(names[i] for i in number) == data.table.captions and len(names) == 7


def test_batches_come_in_their_order_from_many_workers(shards: str, tmp_path: Path) -> None:
    data = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache", decoded_gib=0.0, workers=2)
    assert isinstance(data.images, DecodedOnDemand)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3)).split(8)
    for index, images in zip(order, data.images.batches(order), strict=True):
        assert torch.equal(images, data.images[index])


def test_bad_pairs_are_listed_and_left_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs(range(30), bad=(4,)))
    write_shard(tmp_path / "1.tar", pairs(range(29, 60)))
    data = open_pairs(str(tmp_path / "{0..1}.tar"), "webdataset", SIZE, tmp_path / "cache")
    assert len(data) == 59 and data.skipped == 2 and "0004" not in data.table.keys
    assert np.array_equal(data.images[torch.tensor([4])][0].permute(1, 2, 0), decode_image(picture(5), SIZE))
    listed = pq.read_table(data.folder / "skipped.parquet").to_pylist()
    assert {(row["key"], row["reason"]) for row in listed} == {("0004", "broken image"), ("0029", "duplicate key")}
    for remade in (False, True):  # also by an index made under a laxer rule
        with pytest.raises(UserError, match=r"2 of 61 pairs are bad"):
            open_pairs(
                str(tmp_path / "{0..1}.tar"), "webdataset", SIZE, tmp_path / f"cache{remade or ''}", max_bad=0.01
            )


def test_made_once_and_again_when_the_data_change(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache")
    built: list[str] = []

    real = index_module._rows
    monkeypatch.setattr(index_module, "_rows", lambda source, *rest: built.append(source) or real(source, *rest))
    assert open_pairs(shards, "webdataset", SIZE, tmp_path / "cache").folder == first.folder and not built
    assert len(open_pairs(shards, "webdataset", SIZE, tmp_path / "cache", limit=5)) == 5
    write_shard(tmp_path / "1.tar", pairs(range(40, 71)))
    assert len(open_pairs(shards, "webdataset", SIZE, tmp_path / "cache")) == 71 and len(built) == 2


def test_an_index_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs(range(8), bad=(1, 2)))
    with pytest.raises(UserError, match=r"2 of 8 pairs are bad.*2 broken image; the first is '0001'"):
        open_pairs(str(tmp_path / "0.tar"), "webdataset", SIZE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_one_line(workers: int, shards: str, tmp_path: Path) -> None:
    data = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache", decoded_gib=0.0, workers=workers)
    (tmp_path / "1.tar").unlink()
    write_shard(tmp_path / "1.tar", pairs(range(40, 42)))
    with pytest.raises(
        UserError, match=r"1\.tar: shorter than it was when indexed; put it back, then .*--resume latest"
    ):
        list(data.images.split(35))
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"1\.tar: No such file or directory; put it back"):
        list(data.images.split(35))


def test_a_table_travels_by_its_path(shards: str, tmp_path: Path) -> None:
    table = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache").table
    sent = pickle.dumps(table)
    assert len(sent) < 500 and pickle.loads(sent)[69] == table[69]  # noqa: S301
    part = pickle.loads(pickle.dumps(table.take(np.array([5, 3]))))  # noqa: S301
    assert part.keys == ("0005", "0003") and part[1] == table[3]


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [
        Row("a", "x\n| y", "shard.tar", 512, 99, "cat"),
        Row("b", "\ud83d".encode("utf-8", "replace").decode(), "s3://b/u.tar", 1 << 40, 7, None, (1, 2, 3, 4)),
    ]
    TableBuilder().extend(rows).build().save(tmp_path / "t.arrow")
    table = PairTable.open(tmp_path / "t.arrow")
    assert [table[i] for i in range(2)] == rows
    assert table.with_captions(["p", "q"]).captions == ("p", "q")
    (tmp_path / "t.arrow").write_bytes(b"ARROW1 no")
    with pytest.raises(UserError, match="not an index of pairs"):
        PairTable.open(tmp_path / "t.arrow")


def test_a_path_that_holds_a_newline_is_one_path(tmp_path: Path) -> None:
    files = ["im/no\nsuch.png", "\n", "not-utf8-\udcff.png", "im/1.png", ""]
    rows = [Row(str(i), f"caption {i}", file) for i, file in enumerate(files)]
    TableBuilder().extend(rows).build().save(tmp_path / "t.arrow")
    table = PairTable.open(tmp_path / "t.arrow")
    assert table.files == tuple(files) and [table[i] for i in range(len(rows))] == rows


def test_a_bad_pair_of_a_name_that_is_not_utf8_is_listed(tmp_path: Path) -> None:
    lines = [f"{i}.png\tcaption {i}".encode() for i in range(2)]
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "pairs.csv").write_bytes(b"\n".join([b"filepath\ttitle", b"\xff.png\tnothing", *lines, b""]))
    options = ReadOptions(image_root=str(tmp_path))
    data = open_pairs(str(tmp_path / "pairs.csv"), "csv", SIZE, tmp_path / "cache", options=options, max_bad=0.5)
    listed = pq.read_table(data.folder / "skipped.parquet").to_pylist()
    assert [(row["shard"], row["reason"]) for row in listed] == [(f"{tmp_path}/\\udcff.png", "no image")]


def test_a_stray_newline_in_a_csv_re_pairs_nothing(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(picture(i))
    lines = [f"{i:02d}.png\tcaption {i}" for i in range(40)]
    text = "\n".join(["filepath\ttitle", '"no\nsuch.png"\tnothing', *lines, ""])
    (tmp_path / "pairs.csv").write_text(text)
    options = ReadOptions(image_root=str(tmp_path))
    data = open_pairs(str(tmp_path / "pairs.csv"), "csv", SIZE, tmp_path / "cache", options=options, decoded_gib=0.0)
    assert data.table.captions == tuple(f"caption {i}" for i in range(40)) and data.skipped == 1
    again = open_pairs(str(tmp_path / "pairs.csv"), "csv", SIZE, tmp_path / "cache", options=options, decoded_gib=0.0)
    expected = np.stack([decode_image(picture(i), SIZE) for i in range(40)])
    assert np.array_equal(again.images[torch.arange(40)].permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("metadata", [{"files": "a.png\nb.png"}, {FILES: "[3]"}, {FILES: "["}, {FILES: '"ab"'}])
def test_an_index_of_another_form_is_refused(metadata: dict[str | bytes, str], tmp_path: Path) -> None:
    table = TableBuilder().extend([Row("a", "x", "a.png")]).build()._columns.replace_schema_metadata(metadata)
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"not an index of pairs \(.*\); delete it and it will be made again"):
        PairTable.open(tmp_path / "t.arrow")


def test_an_index_is_read_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    TableBuilder().extend([Row("a", "x", "a.png")]).build().save(path)
    table = PairTable.open(path)
    assert PairTable.open(path) is table
    TableBuilder().extend([Row("b", "x", "b.png")]).build().save(path)
    assert PairTable.open(path)[0] == Row("b", "x", "b.png") and table[0] == Row("a", "x", "a.png")
    path.unlink()
    with pytest.raises(UserError, match="not an index of pairs"):
        PairTable.open(path)


def test_keys_are_found_again() -> None:
    keys = [f"key {i}" for i in range(1000)]
    index = KeyIndex(hash_keys(keys))
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(index.find(hash_keys([keys[i] for i in order])), order)
    assert index.find(hash_keys(["key 1000", "key 3"])).tolist() == [-1, 3]
    with pytest.raises(UserError, match="two pairs have one key"):
        KeyIndex(hash_keys(["a", "b", "a"]))


@pytest.mark.parametrize("kept", [8.0, 0.0])
def test_a_manifest_drops_and_re_pairs_without_a_copy(kept: float, shards: str, tmp_path: Path) -> None:
    data = open_pairs(shards, "webdataset", SIZE, tmp_path / "cache", decoded_gib=kept)
    keys = data.table.keys
    action = ["drop" if i % 5 == 0 else "re-pair" if i % 5 == 1 else "keep" for i in range(70)]
    new = [f"new {i}" if a == "re-pair" else None for i, a in enumerate(action)]
    columns = {"key": pa.array(keys), "action": pa.array(action), "new_caption": pa.array(new, pa.string())}
    pq.write_table(pa.table(columns).take(np.random.default_rng(0).permutation(70)), tmp_path / "m.parquet")
    got = data.under(read_manifest(tmp_path / "m.parquet"))
    rows = [i for i in range(70) if i % 5]
    assert len(got) == len(got.images) == 56 and got.table.keys == tuple(keys[i] for i in rows)
    assert got.table.captions == tuple(f"new {i}" if i % 5 == 1 else f"caption {i % 7}" for i in rows)
    index = torch.tensor([55, 0, 17])
    expected = data.images[torch.tensor([rows[int(i)] for i in index])]
    assert torch.equal(got.images[index], expected)
    assert torch.equal(next(iter(fetch(got.images, [index]))), expected)
    assert torch.equal(torch.cat(list(got.images.split(32))), data.images[torch.tensor(rows)])
    pq.write_table(pa.table({**columns, "key": pa.array([f"x{key}" for key in keys])}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="says nothing of pair '0000'"):
        data.under(read_manifest(tmp_path / "m.parquet"))
