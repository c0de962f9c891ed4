"""Readers on files in each official format, made small: keys, captions, and the very bytes of every image."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otcclip.data.decode import BadPair
from otcclip.data.images import Gone, read_bytes
from otcclip.data.pairs import Pair
from otcclip.data.readers import ReadOptions, Spool, find_reader
from otcclip.data.shards import Skipped, write_shard
from otcclip.data.table import PairTable, Row, TableBuilder
from otcclip.errors import UserError


def encoded(shade: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    handle = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(handle, kind)
    return handle.getvalue()


def read(source: Path | str, kind: str, tmp_path: Path, **options: object) -> tuple[list[Row], list[Skipped]]:
    spool = Spool(tmp_path / "spool.bin")
    out = list(find_reader(kind, str(source))[1](str(source), ReadOptions(**options), spool))  # type: ignore[arg-type]
    spool.close()
    return [r for r in out if isinstance(r, Row)], [r for r in out if isinstance(r, Skipped)]


def shard(path: Path, keys: range) -> Path:
    write_shard(path, (Pair(f"{i:09d}", encoded(i), f"a caption of {i}", metadata={"url": "u"}) for i in keys))
    return path


@pytest.mark.parametrize("remote", [False, True])
def test_webdataset(remote: bool, tmp_path: Path) -> None:
    for i in range(2):
        shard(tmp_path / f"{i:05d}.tar", range(i * 3, i * 3 + 3))
    pattern = str(tmp_path / "{00000..00001}.tar")
    rows, skipped = read(f"file://{pattern}" if remote else pattern, "auto", tmp_path)
    assert [row.key for row in rows] == [f"{i:09d}" for i in range(6)] and not skipped
    assert [row.caption for row in rows] == [f"a caption of {i}" for i in range(6)]
    assert [read_bytes(row) for row in rows] == [encoded(i) for i in range(6)]


def test_shards_joined_as_in_open_clip(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a.tar", range(2)), shard(tmp_path / "b.tar", range(5, 7))
    rows, _ = read(f"{one}::{two}", "webdataset", tmp_path)
    assert [row.key for row in rows] == ["000000000", "000000001", "000000005", "000000006"]


def img2dataset_shard(folder: Path, successes: int, keys: range) -> None:
    shard(folder / "00000.tar", keys)
    statistics = {
        "count": 9,
        "successes": successes,
        "failed_to_download": 9 - successes,
        "status_dict": {"success": 3},
    }
    (folder / "00000_stats.json").write_text(json.dumps(statistics))
    columns = {"key": [f"{i:09d}" for i in keys], "status": ["success"] * len(keys)}
    pq.write_table(pa.table(columns), folder / "00000.parquet")


def test_img2dataset(tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 3, range(3))
    rows, skipped = read(tmp_path, "auto", tmp_path)
    assert [read_bytes(row) for row in rows] == [encoded(i) for i in range(3)] and not skipped


def test_img2dataset_that_lost_pairs_is_one_line(tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 4, range(3))
    with pytest.raises(UserError, match=r"00000\.tar: 3 pairs where 00000_stats\.json counts 4; truncated\?"):
        read(tmp_path, "img2dataset", tmp_path)


def test_img2dataset_files(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "00000"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i:09d}.jpg").write_bytes(encoded(i, "JPEG"))
        (folder / f"{i:09d}.json").write_text("{}")
        if i != 1:
            (folder / f"{i:09d}.txt").write_text(f"picture {i}")
    rows, skipped = read(tmp_path / "out", "img2dataset", tmp_path)
    assert [(row.key, row.caption) for row in rows] == [("000000000", "picture 0"), ("000000002", "picture 2")]
    assert read_bytes(rows[1]) == encoded(2, "JPEG")
    assert [(s.key, s.reason) for s in skipped] == [("000000001", "no caption")]


def test_img2dataset_files_under_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "00000"
    folder.mkdir(parents=True)
    for name in (b"\xff1", b"\xff2"):
        for extension, data in ((b".jpg", encoded(1, "JPEG")), (b".txt", b"a caption" if name == b"\xff1" else b"")):
            with open(os.fsencode(folder) + b"/" + name + extension, "wb") as handle:  # noqa: PTH123
                handle.write(data)
    rows, skipped = read(tmp_path / "out", "img2dataset", tmp_path)
    assert [(r.key, r.caption) for r in rows] == [("\\xff1", "a caption")]
    assert [(s.key, s.reason) for s in skipped] == [("\\xff2", "empty caption")]
    TableBuilder().extend(rows).build().save(tmp_path / "t.arrow")
    assert read_bytes(PairTable.open(tmp_path / "t.arrow")[0]) == encoded(1, "JPEG")


@pytest.mark.parametrize("text", ["{", "[]", '{"successes": null}', '{"successes": 1e999}', '{"successes": "x"}'])
def test_statistics_that_are_none_are_one_line(text: str, tmp_path: Path) -> None:
    img2dataset_shard(tmp_path, 3, range(3))
    (tmp_path / "00000_stats.json").write_text(text)
    with pytest.raises(UserError, match=r"00000_stats\.json: not img2dataset's statistics"):
        read(tmp_path, "img2dataset", tmp_path)


def write_csv(
    path: Path, rows: list[list[str]], header: tuple[str, str] = ("filepath", "title"), tab: str = "\t"
) -> Path:
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter=tab).writerows([header, *rows])
    return path


def test_open_clip_csv(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    path = str(tmp_path / "a.png")
    rows, skipped = read(
        write_csv(tmp_path / "pairs.csv", [[path, 'says "hi"'], [path, "again"], ["b.png", "  "], ["", "no file"]]),
        "auto",
        tmp_path,
    )
    assert [(r.key, r.caption, r.file) for r in rows] == [(path, 'says "hi"', path), (f"{path}#1", "again", path)]
    assert [(s.key, s.reason) for s in skipped] == [("b.png", "empty caption"), ("line 5", "no image")]
    assert read_bytes(rows[0]) == encoded(1)


def test_csv_by_other_names(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "pairs.csv", [["x.jpg", "a dog, barking"]], ("url", "alt"), ",")
    rows, _ = read(path, "csv", tmp_path, img_key="url", caption_key="alt", separator=",", image_root="/images")
    assert [(r.key, r.caption, r.file) for r in rows] == [("x.jpg", "a dog, barking", "/images/x.jpg")]
    with pytest.raises(UserError, match=r"no column 'filepath' \(--csv-img-key\).*its columns are 'url,alt'"):
        read(path, "csv", tmp_path)


def test_csv_with_a_broken_row_and_foreign_bytes(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"filepath\ttitle\na\tok\nb\t" + b"x" * 200_000 + b"\nc\tcaf\xe9\nd\tfine\n")
    rows, skipped = read(path, "csv", tmp_path)
    assert [r.key for r in rows] == ["a", "d"]
    assert [s.reason for s in skipped] == ["broken row", "caption is not UTF-8"]


@pytest.mark.parametrize("separator", ["", "ab", "\t\t", '"', "\n", "\r", "\0", "\\n"])
def test_a_csv_separator_that_is_none_is_one_line(separator: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--csv-separator [^\n]+: one character[^\n]+$"):
        read(write_csv(tmp_path / "pairs.csv", [["a.png", "c"]]), "csv", tmp_path, separator=separator)


@pytest.mark.parametrize("separator", ["\\t", "\t"])
def test_a_tab_as_shells_give_it(separator: str, tmp_path: Path) -> None:
    rows, _ = read(write_csv(tmp_path / "pairs.csv", [["a.png", "c"]]), "csv", tmp_path, separator=separator)
    assert [(row.key, row.caption) for row in rows] == [("a.png", "c")]


def test_a_csv_without_a_header_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath\ttitle" + "x" * 200_000 + "\na\tb\n")
    with pytest.raises(UserError, match=r"pairs\.csv: its first line is no header: field larger"):
        read(tmp_path / "pairs.csv", "csv", tmp_path)


def parquet_of(kind: str, folder: Path) -> pa.Table:
    images = [encoded(1), encoded(2), None, encoded(4)]
    paths = ["a.png", "b.png", None, "d.png"]
    if kind == "bytes":
        column = pa.array(images, pa.binary())
    elif kind == "struct":
        column = pa.array([{"bytes": i, "path": p} for i, p in zip(images, paths, strict=True)])
    else:
        for image, name in zip(images, paths, strict=True):
            if image and name:
                (folder / name).write_bytes(image)
        column = pa.array(paths)
    return pa.table({"image": column, "text": ["one", "two", "three", None], "key": ["k1", "k2", "k3", "k4"]})


@pytest.mark.parametrize("kind", ["bytes", "struct", "paths"])
def test_parquet(kind: str, tmp_path: Path) -> None:
    pq.write_table(parquet_of(kind, tmp_path), tmp_path / "part-0.parquet", row_group_size=2)
    rows, skipped = read(tmp_path / "part-0.parquet", "auto", tmp_path, image_root=str(tmp_path))
    assert [(r.key, r.caption) for r in rows] == [("k1", "one"), ("k2", "two")]
    assert [read_bytes(r) for r in rows] == [encoded(1), encoded(2)]
    assert [(s.key, s.reason) for s in skipped] == [("k3", "no image"), ("k4", "no caption")]


def test_parquet_without_the_columns_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b""], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column 'image' \(--csv-img-key\); there are: 'picture', 'text'"):
        read(tmp_path / "x.parquet", "parquet", tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "x.parquet", "parquet", tmp_path)


def not_utf8(first: bytes, large: bool = False) -> pa.Array:
    """Text as a C++ program may write it: Parquet and Arrow do not check."""
    values = pa.array([first, b"fine"], pa.large_binary() if large else pa.binary())
    return pa.Array.from_buffers(pa.large_string() if large else pa.string(), 2, values.buffers())


def write_hf(folder: Path, table: pa.Table) -> Path:
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


def read_table(kind: str, table: pa.Table, tmp_path: Path) -> tuple[list[Row], list[Skipped]]:
    if kind == "hf":
        return read(write_hf(tmp_path, table), kind, tmp_path)
    pq.write_table(table, tmp_path / "x.parquet")
    return read(tmp_path / "x.parquet", kind, tmp_path, image_root=str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize("large", [False, True])
def test_a_caption_that_is_not_utf8_spoils_its_pair_alone(kind: str, large: bool, tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(1), encoded(2)], "text": not_utf8(b"caf\xe9", large), "id": not_utf8(b"\xff")})
    rows, skipped = read_table(kind, table, tmp_path)
    assert [(r.key, r.caption) for r in rows] == [("fine", "fine")] and read_bytes(rows[0]) == encoded(2)
    assert [(s.key, s.reason) for s in skipped] == [("\\xff", "caption is not UTF-8")]
    assert read_table(kind, table.set_column(1, "text", pa.array([b"one", b"two"])), tmp_path)[0][0].caption == "one"


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_path_that_is_not_utf8_is_the_files_own(kind: str, tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as handle:  # noqa: PTH123
        handle.write(encoded(3))
    image = pa.StructArray.from_arrays([pa.array([None, encoded(2)]), not_utf8(b"\xff.png")], ["bytes", "path"])
    rows, _ = read_table(kind, pa.table({"image": image, "text": ["a", "b"], "label": not_utf8(b"\xfe")}), tmp_path)
    assert [(r.key, r.label) for r in rows] == [("\\xff.png", "\\xfe"), ("fine", "fine")]
    TableBuilder().extend(rows).build().save(tmp_path / "t.arrow")
    assert kind == "hf" or read_bytes(rows[0]) == encoded(3)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": [["a"], ["b"]]}, "captions are list<.*>, expected text"),
        ({"text": ["a", "b"], "id": pa.array([1 << 60, 1], pa.timestamp("ms"))}, "not a readable"),
        ({"image": [{"bytes": b"x", "path": 3}] * 2, "text": ["a", "b"]}, "paths of images are int64, expected text"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_columns_that_are_of_no_use_are_one_line(
    kind: str, columns: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        read_table(kind, pa.table({"image": [encoded(1), encoded(2)]} | columns), tmp_path)
    twice = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])], ["image", "text", "text"])
    with pytest.raises(UserError, match="2 columns are called 'text'"):
        read_table(kind, twice, tmp_path)


@pytest.mark.parametrize("column", [0, 1, 2])
@pytest.mark.parametrize("offsets", [(4096, 4100), (-60, 10), (1 << 30, 1 << 30), (40, 8)])
def test_crafted_offsets_are_refused(column: int, offsets: tuple[int, int], tmp_path: Path) -> None:
    """Offsets that leave the column's bytes: followed, they read foreign memory or end the process."""
    values: list[list[bytes]] = [[b"i" * 11, b"j" * 13], [b"c" * 17, b"d" * 19], [b"k" * 23, b"l" * 29]]
    columns = [pa.array(values[0])] + [pa.array([v.decode() for v in two]) for two in values[1:]]
    write_hf(tmp_path, pa.Table.from_arrays(columns, ["image", "text", "key"]))
    data = bytearray((tmp_path / "data.arrow").read_bytes())
    first, both = len(values[column][0]), sum(map(len, values[column]))
    place = data.index(struct.pack("<3i", 0, first, both))
    data[place + 4 : place + 12] = struct.pack("<2i", *offsets)
    (tmp_path / "data.arrow").write_bytes(data)
    with pytest.raises(UserError, match=r"data\.arrow: not a readable Arrow stream: [^\n]+$"):
        read(tmp_path, "hf", tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"splits": [5]}', '{"splits": 5}', '{"splits": {"a": 1}}', '"a"', "[" * 100_000, "{}"]
)
def test_a_list_of_splits_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset_dict\.json: does not list the splits"):
        read(tmp_path, "hf", tmp_path)


@pytest.mark.parametrize("name", ["pipe", "\ud83d", "", "..", "a\0"])
def test_a_file_of_state_json_that_is_none_is_one_line(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"^[^\n]+: not a readable Arrow stream: [^\n]+$"):
        read(tmp_path, "hf", tmp_path)


def test_hugging_face_on_disk(tmp_path: Path) -> None:
    """Written by `datasets` itself, several batches, a selection of rows: offsets inside the Arrow file are right."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    whole = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(9)], "caption": [f"no {i}" for i in range(9)]},
        features=features,
    )
    datasets.DatasetDict({"train": whole.select([7, 2, 5])}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"holds several splits; name one, for instance .*train"):
        read(tmp_path / "d", "auto", tmp_path)
    rows, skipped = read(tmp_path / "d" / "train", "auto", tmp_path)
    assert [r.caption for r in rows] == ["no 7", "no 2", "no 5"] and not skipped
    assert [read_bytes(r) for r in rows] == [encoded(i) for i in (7, 2, 5)]
    assert all(r.size > 0 for r in rows), "read in place"


def test_arrow_stream_of_several_batches(tmp_path: Path) -> None:
    table = pa.table(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(7)], "text": [str(i) for i in range(7)]}
    )
    with pa.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    rows, _ = read(tmp_path, "hf", tmp_path)
    assert [read_bytes(r) for r in rows] == [encoded(i) for i in range(7)]
    assert len({r.key for r in rows}) == 7
    with pa.ipc.new_stream(
        str(tmp_path / "data.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="compressed Arrow"):
        read(tmp_path, "hf", tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../secret.arrow"}]}))
    with pytest.raises(UserError, match="names a file outside its folder"):
        read(tmp_path, "hf", tmp_path)


def coco_files(root: Path) -> Path:
    """The layout of `annotations_trainval2017.zip` beside `train2017.zip`."""
    (root / "annotations").mkdir()
    (root / "train2017").mkdir()
    for i in (9, 25):
        (root / "train2017" / f"{i:012d}.jpg").write_bytes(encoded(i, "JPEG"))
    value = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [{"id": 1, "name": "l", "url": "u"}],
        "images": [
            {"license": 1, "file_name": f"{i:012d}.jpg", "height": 10, "width": 12, "id": i, "coco_url": "http://x"}
            for i in (9, 25)
        ]
        + [{"file_name": "../../etc/passwd", "id": 66}],
        "annotations": [
            {"image_id": 9, "id": 661611, "caption": "Closeup of bins of food."},
            {"image_id": 25, "id": 122312, "caption": "A giraffe eating leaves. "},
            {"image_id": 9, "id": 661977, "caption": "A meal in plastic."},
            {"image_id": 66, "id": 5, "caption": "leave the folder"},
            {"image_id": 404, "id": 6, "caption": "no such image"},
            {"image_id": "x", "id": 7, "caption": "no number"},
            {"image_id": 25, "id": 8},
        ],
    }
    path = root / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps(value))
    return path


def test_coco_captions(tmp_path: Path) -> None:
    rows, skipped = read(coco_files(tmp_path), "auto", tmp_path)
    assert [(r.key, r.caption) for r in rows] == [
        ("000000000009-661611", "Closeup of bins of food."),
        ("000000000025-122312", "A giraffe eating leaves."),
        ("000000000009-661977", "A meal in plastic."),
    ]
    assert [read_bytes(r) for r in rows] == [encoded(i, "JPEG") for i in (9, 25, 9)]
    assert [s.reason for s in skipped] == ["not a regular file", "no image", "broken row", "no caption"]
    # Under its own key, where it has one.
    assert [s.key for s in skipped] == ["000000000066-5", "000000000404-6", "annotation 5", "000000000025-8"]


INFINITE = float("inf")  # `json` writes and reads it, and 1e999 becomes it


def changed(path: Path, change: Callable[[Any], object]) -> Path:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "entry", [{"id": INFINITE, "file_name": "x"}, {"id": 3}, 5, None, {"id": "x", "file_name": "y"}]
)
def test_one_bad_image_of_coco_costs_its_own_captions_alone(entry: object, tmp_path: Path) -> None:
    path = changed(coco_files(tmp_path), lambda value: value["images"].append(entry))
    changed(path, lambda value: value["annotations"].append({"image_id": 3, "id": 1, "caption": "c"}))
    rows, skipped = read(path, "coco", tmp_path)
    assert len(rows) == 3 and (skipped[-1].key, skipped[-1].reason) == ("000000000003-1", "no image")


@pytest.mark.parametrize("entry", [5, None, "x", {"image_id": INFINITE, "id": 1}, {"image_id": 9, "id": INFINITE}])
def test_one_bad_caption_of_coco_is_counted(entry: object, tmp_path: Path) -> None:
    path = changed(coco_files(tmp_path), lambda value: value["annotations"].append(entry))
    rows, skipped = read(path, "coco", tmp_path)
    assert len(rows) == 3 and (skipped[-1].key, skipped[-1].reason) == ("annotation 7", "broken row")


@pytest.mark.parametrize("value", [None, 3, "ab", {"a": 1}])
@pytest.mark.parametrize("field", ["annotations", "images"])
def test_coco_without_its_lists_is_one_line(field: str, value: object, tmp_path: Path) -> None:
    path = changed(coco_files(tmp_path), lambda whole: whole.update({field: value}))
    with pytest.raises(UserError, match="not COCO captions"):
        read(path, "coco", tmp_path)


def visual_genome_files(root: Path) -> Path:
    (root / "VG_100K").mkdir()
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[10:30, 20:50] = (255, 0, 0)
    Image.fromarray(picture).save(root / "VG_100K" / "2.jpg", quality=95)
    images = [
        {
            "width": 60,
            "url": "https://cs.stanford.edu/people/rak248/VG_100K/2.jpg",
            "height": 40,
            "image_id": 2,
            "coco_id": None,
            "flickr_id": None,
        }
    ]
    box = {"region_id": 1382, "width": 30, "height": 20, "image_id": 2, "phrase": "a red sign", "y": 10, "x": 20}
    outside = {"region_id": 1383, "width": 5, "height": 5, "image_id": 2, "phrase": "nowhere", "y": 90, "x": 90}
    (root / "image_data.json").write_text(json.dumps(images))
    path = root / "region_descriptions.json"
    path.write_text(json.dumps([{"regions": [box, outside], "id": 2}]))
    return path


@pytest.mark.parametrize("crop", [False, True])
def test_visual_genome(crop: bool, tmp_path: Path) -> None:
    rows, skipped = read(visual_genome_files(tmp_path), "auto", tmp_path, crop_regions=crop)
    assert [(r.key, r.caption) for r in rows] == [("2-1382", "a red sign"), ("2-1383", "nowhere")] and not skipped
    assert rows[0].box == ((20, 10, 30, 20) if crop else None)
    assert rows[0].file.endswith("VG_100K/2.jpg") and len(read_bytes(rows[0])) > 100


@pytest.mark.parametrize("change", [{"x": 1 << 40}, {"width": -(1 << 31) - 1}, {"x": INFINITE}, {"image_id": INFINITE}])
def test_a_region_beyond_numbers_is_counted(change: dict[str, object], tmp_path: Path) -> None:
    path = changed(visual_genome_files(tmp_path), lambda value: value[0]["regions"][0].update(change))
    rows, skipped = read(path, "visual-genome", tmp_path, crop_regions=True)
    assert [row.key for row in rows] == ["2-1383"] and [s.reason for s in skipped] == ["broken row"]
    TableBuilder().extend(rows).build().save(tmp_path / "t.arrow")


def test_bad_entries_of_visual_genome_are_counted(tmp_path: Path) -> None:
    path = changed(visual_genome_files(tmp_path), lambda value: value.extend([{"regions": None}, 5, {"regions": [7]}]))
    changed(tmp_path / "image_data.json", lambda value: value.extend([{"image_id": INFINITE, "url": "a"}, None]))
    rows, skipped = read(path, "visual-genome", tmp_path)
    assert len(rows) == 2 and [(s.key, s.reason) for s in skipped] == [(f"region {i}", "broken row") for i in (2, 3, 4)]


@pytest.mark.parametrize("kind", ["coco", "visual-genome"])
@pytest.mark.parametrize("text", ["[1", "[" * 100_000, '{"images": 3}', "[3]"])
def test_other_json_is_one_line(kind: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "image_data.json").write_text("[]")
    with pytest.raises(UserError, match=r"x\.json: not "):
        read(tmp_path / "x.json", kind, tmp_path)


def test_an_unknown_type_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset-type 'webdatset'; did you mean 'webdataset'"):
        find_reader("webdatset", "x")
    with pytest.raises(UserError, match="cannot tell its format; say --dataset-type"):
        find_reader("auto", str(tmp_path / "x.lmdb"))


def test_files_that_are_none_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadPair, match="not a regular file"):
            read_bytes(Row("k", "c", str(name)))


ADDRESSES = ["nope://x.png", "file:///nosuch.png", "memory://x.png", "dir://x", "reference://x", "tar://x.png"]
ADDRESSES += ["zip://x.png::file:{}/a.zip", "file://{}/pipe.png", "file://{}/a.png", "github://a:b@c/d.png"]
ADDRESSES += ["http://127.0.0.1:9/x.png", "simplecache::http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_a_data_set_is_never_opened(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *args: pytest.fail(f"asked for {args}"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(encoded(1))
    path = address.format(tmp_path)
    rows, _ = read(write_csv(tmp_path / "pairs.csv", [[path, "a caption"]]), "csv", tmp_path)
    table = pa.table({"image": [path], "text": ["a caption"]})
    pq.write_table(table, tmp_path / "x.parquet")
    rows += read(tmp_path / "x.parquet", "parquet", tmp_path)[0]
    assert len(rows) == 2
    for row in rows:
        with pytest.raises(BadPair, match="no image"):
            read_bytes(row)


@pytest.mark.parametrize("address", [a for a in ADDRESSES if not a.startswith(("file", "github"))])
def test_an_address_of_a_shard_that_fails_is_one_line(address: str, tmp_path: Path) -> None:
    shard_at = address.format(tmp_path)
    with pytest.raises(Gone, match=r"^[^\n]+: [^\n]+$"):
        read_bytes(Row("k", "c", shard_at, 512, 10))
    with pytest.raises(UserError, match=r"^[^\n]+: [^\n]+$"):
        list(find_reader("webdataset", "x")[1](shard_at, ReadOptions(), Spool(tmp_path / "spool")))
