"""Shards: deterministic to write, safe to read, and a count of everything that was skipped."""

from __future__ import annotations

import gc
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otcclip.data import Limits, Pair, Skipped, expand_shards, load_store, read_shard, write_shard
from otcclip.errors import UserError


def png(colour: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (colour, colour, colour)).save(buffer, "png")
    return buffer.getvalue()


def pairs(n: int = 4, start: int = 0) -> list[Pair]:
    return [
        Pair(f"k{i:03d}", png(i), f"caption {i}", f"name {i % 2}", {"source": "noto"}) for i in range(start, start + n)
    ]


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as an enemy may write it: any names, any order."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, **changed: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.{ext}", data) for ext, data in ({"png": png(), "txt": b"a bear"} | changed).items()]


def read(path: Path, **kwargs: object) -> tuple[list[Pair], list[Skipped]]:
    skipped: list[Skipped] = []
    return list(read_shard(path, on_skip=skipped.append, **kwargs)), skipped  # type: ignore[arg-type]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "0.tar", pairs()) == 4
    found, skipped = read(tmp_path / "0.tar")
    assert found == pairs()
    assert skipped == []


def test_an_image_is_named_by_its_own_first_bytes(tmp_path: Path) -> None:
    kinds = {"jpg": b"\xff\xd8\xff", "webp": b"RIFF1234WEBP", "png": b"\x89PNG\r\n\x1a\n"}
    images = {**kinds, "odd": b"GIF89a"}
    write_shard(tmp_path / "0.tar", [Pair(kind, data, "a bear") for kind, data in images.items()], image_extension=None)
    with tarfile.open(tmp_path / "0.tar") as archive:
        names = [name for name in archive.getnames() if not name.endswith((".txt", ".json"))]
    assert names == ["jpg.jpg", "webp.webp", "png.png", "odd.png"]


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", pairs())
    monkeypatch.setattr("time.time", lambda: 0.0)
    write_shard(tmp_path / "1.tar", pairs())
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real refusal by the kernel, in the middle of the tar: the process may not write past 8 kB."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(UserError, match=r"0\.tar: cannot write: File too large"):
            write_shard(tmp_path / "0.tar", pairs(50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    import webdataset

    write_shard(tmp_path / "0.tar", pairs())
    samples = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [p.key for p in pairs()]
    assert samples[0]["txt"] == b"caption 0"


@pytest.mark.parametrize("remove", [1, 512, 10_240])
@pytest.mark.parametrize("members", [1, 5])
def test_a_truncated_tar_names_the_file(tmp_path: Path, remove: int, members: int) -> None:
    path = tmp_path / "cut.tar"
    write_shard(path, pairs(members))
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end[: max(1, len(end) - remove)])
    with pytest.raises(UserError, match=r"cut\.tar: truncated or broken tar shard") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_tar_cut_between_two_members_is_truncated_too(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    write_shard(path, pairs())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[6]
    data = path.read_bytes()
    for cut in (third.offset, third.offset + 100):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="truncated"):
            read(path)


def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    write_shard(path, pairs())
    with tarfile.open(path) as archive:
        third = archive.getmembers()[6]
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or broken"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + b"\0" * 600, b"x" * 2000])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "no.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"no\.tar"):
        read(tmp_path / "no.tar")


def test_a_header_that_asks_for_gigabytes(tmp_path: Path) -> None:
    """A long-name header of 3 GB: tarfile would read it into memory before looking at it."""
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 3 << 30
    path = tmp_path / "long.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(UserError, match="asks for"):
        read(path)


def test_a_negative_size_does_not_loop(tmp_path: Path) -> None:
    """Its end is its own beginning: tarfile would read the same header for ever."""
    empty = tarfile.TarInfo("a.bin").tobuf(tarfile.GNU_FORMAT)
    header = bytearray(tarfile.TarInfo("b.bin").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "loop.tar").write_bytes(empty + bytes(header) + b"\0" * 1024)
    with pytest.raises(UserError, match=r"loop\.tar"):
        read(tmp_path / "loop.tar")


def test_bad_pairs_are_skipped_with_their_reason(tmp_path: Path) -> None:
    cases = {
        "empty caption": sample("a", txt=b"  "),
        "no caption": [("b.png", png())],
        "no image": [("c.txt", b"a bear")],
        "not an allowed format": [("d.gif", b"GIF89a"), ("d.txt", b"a bear")],
        "caption too long": sample("e", txt=b"x" * 5000),
        "caption is not UTF-8": sample("f", txt=b"\xff\xff"),
        "metadata too deep": sample("g", json=b"[" * 1000),
        "broken metadata": sample("h", json=b"{"),
        "member too large": sample("i", png=b"\0" * 2_000_000),
    }
    path = tar(tmp_path / "0.tar", [m for members in cases.values() for m in members] + sample("good"))
    found, skipped = read(path, limits=Limits(member_bytes=1_000_000))
    assert [pair.key for pair in found] == ["good"]
    assert [record.reason for record in skipped] == list(cases)
    assert {record.shard for record in skipped} == {str(path)}


def test_member_names_are_keys_and_nothing_is_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    monkeypatch.chdir(inside)
    names = ["../../etc/passwd", "/etc/passwd", "..", ""]
    members = [m for name in names for m in sample(name)] + [("", b"x"), ("..", b"x"), ("./k.d/x", b"")]
    path = tar(inside / "0.tar", members)
    found, _ = read(path)
    assert {"../../etc/passwd", "/etc/passwd"} <= {pair.key for pair in found}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["0.tar", "in"]


def test_links_and_devices_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for key, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.FIFOTYPE)):
            image = tarfile.TarInfo(f"{key}.png")
            image.size = len(png())
            archive.addfile(image, io.BytesIO(png()))
            link = tarfile.TarInfo(f"{key}.txt")
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
    found, skipped = read(path)
    assert found == []
    assert {record.reason for record in skipped} == {"not a regular file"}


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "npy"])
def test_a_pickle_member_is_never_opened(tmp_path: Path, extension: str) -> None:
    bomb = pickle.dumps(Bomb())
    path = tar(tmp_path / "0.tar", [*sample("good", **{extension: bomb}), (f"bad.{extension}", bomb)])
    found, skipped = read(path)
    assert [(pair.key, pair.metadata) for pair in found] == [("good", {})]
    assert [(record.key, record.reason) for record in skipped] == [("bad", "not an allowed format")]


def test_pipes_are_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for use in (read_shard, expand_shards, lambda s: load_store(s, 8), lambda s: expand_shards([s])):
        with pytest.raises(UserError, match="pipe:"):
            list(use(f"pipe:touch {trap}"))  # type: ignore[arg-type]
    for odd in (
        f"PIPE:touch {trap}",
        f" pipe:touch {trap}",
        f"pipe://touch {trap}",
        f"file://x::pipe:{trap}",
    ):
        with pytest.raises(UserError):
            list(read_shard(odd))
    assert not trap.exists()


def test_brace_patterns_folders_and_lists(tmp_path: Path) -> None:
    assert expand_shards("a/{00000..00041}.tar")[::41] == ["a/00000.tar", "a/00041.tar"]
    assert expand_shards(["x.tar", "{a,b}.tar"]) == ["x.tar", "a.tar", "b.tar"]
    for i in (1, 0):
        write_shard(tmp_path / f"{i}.tar", pairs(1, i))
    assert [Path(s).name for s in expand_shards(tmp_path)] == ["0.tar", "1.tar"]
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", [], "{a.tar"):
        with pytest.raises(UserError):
            expand_shards(wrong)  # type: ignore[arg-type]


def test_missing_shards_and_unknown_protocols(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard"):
        read(tmp_path / "none.tar")
    for url in ("nothing://x.tar", "memory://none.tar"):
        with pytest.raises(UserError):
            list(read_shard(url))


def test_fsspec_urls_are_read(tmp_path: Path) -> None:
    import fsspec

    write_shard(tmp_path / "0.tar", pairs())
    fsspec.filesystem("memory").pipe("/shard.tar", (tmp_path / "0.tar").read_bytes())
    assert list(read_shard("memory://shard.tar")) == pairs()


# load_store


def test_load_store_decodes_labels_and_sources(tmp_path: Path) -> None:
    for i in range(2):
        write_shard(tmp_path / f"{i}.tar", pairs(3, 3 * i))
    store = load_store(str(tmp_path / "{0..1}.tar"), 4)
    assert store.keys == tuple(p.key for p in pairs(6))
    assert store.images.shape == (6, 4, 4, 3)
    assert [int(i[0, 0, 0]) for i in store.images] == list(range(6))
    assert store.labels[:2] == ("name 0", "name 1")
    assert set(store.sources) == {"noto"}


def test_without_labels_and_sources(tmp_path: Path) -> None:
    path = tar(tmp_path / "00007.tar", sample("a") + sample("b", json=b'{"label": "x"}'))
    store = load_store(path, 4)
    assert store.labels == ()
    assert store.sources == ("00007", "00007")


def bad_corpus(tmp_path: Path) -> Path:
    members = [m for pair in pairs(17) for m in sample(pair.key)]
    members += sample("x1", png=b"no image") + sample("x2", png=png()[:40]) + sample("k000")
    return tar(tmp_path / "0.tar", members)


def test_bad_pairs_are_counted_and_listed(tmp_path: Path) -> None:
    store = load_store(bad_corpus(tmp_path), 4, max_bad=0.15, skipped_path=tmp_path / "skipped.parquet")
    assert len(store) == 17
    rows = pq.read_table(tmp_path / "skipped.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in rows] == [
        ("x1", "not an allowed format"),
        ("x2", "broken image"),
        ("k000", "duplicate key"),
    ]
    assert set(rows[0]) == {"key", "shard", "reason"}


def test_past_max_bad_it_stops_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_store(bad_corpus(tmp_path), 4, max_bad=0.149, skipped_path=tmp_path / "skipped.parquet")
    assert "3 of 20 pairs are bad" in str(error.value)
    assert "1 broken image, 1 duplicate key, 1 not an allowed format" in str(error.value)
    assert pq.read_table(tmp_path / "skipped.parquet").num_rows == 3  # listed although it stopped


def test_an_empty_list_is_written_too(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", pairs())
    load_store(tmp_path / "0.tar", 4, skipped_path=tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 0


def test_nothing_usable_stops_whatever_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 of 1"):
        load_store(tar(tmp_path / "0.tar", sample("a", txt=b"")), 4, max_bad=1.0)
    with pytest.raises(UserError, match="no pair"):
        load_store(tar(tmp_path / "1.tar", []), 4)


@pytest.mark.parametrize(("size", "max_bad"), [(0, 0.05), (8, 1.5), (8, -0.1)])
def test_arguments_out_of_range(tmp_path: Path, size: int, max_bad: float) -> None:
    with pytest.raises(UserError):
        load_store(tmp_path / "0.tar", size, max_bad)


def test_hostile_keys_reach_the_terminal_stripped(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", sample("\x1b[2Jevil", txt=b""))
    with pytest.raises(UserError) as error:
        load_store(path, 4)
    assert "\x1b" not in str(error.value)
    assert "evil" in str(error.value)


def test_names_that_are_not_utf8_can_be_listed(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name, data in sample("a\udcff"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert load_store(path, 4).keys == ("a\\xff",)


def test_json_members_are_deterministic(tmp_path: Path) -> None:
    shuffled = [Pair("a", png(), "c", "n", {"z": "1", "b": "2"})]
    write_shard(tmp_path / "0.tar", shuffled)
    with tarfile.open(tmp_path / "0.tar") as archive:
        handle = archive.extractfile("a.json")
        assert handle is not None
        assert list(json.load(handle)) == ["b", "label", "z"]
    assert np.array_equal(load_store(tmp_path / "0.tar", 8).images[0], np.zeros((8, 8, 3)))
