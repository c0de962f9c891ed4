"""What an enemy puts into a shard: counted by its reason, harmless on disk, on the terminal and in the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from otcclip.attacks import PoisonRecord, write_records
from otcclip.curation import Scan, ScanOptions
from otcclip.curation.story import print_summary
from otcclip.data import Pair
from otcclip.errors import UserError

SCRIPT = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
ANSI = "a cat\x1b[2J\x1b]0;owned\x07 on a mat"
Tar = Callable[..., Path]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises 623 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def good(pairs: list[Pair], n: int) -> list[tuple[str, bytes]]:
    return [
        member
        for pair in pairs[:n]
        for member in ((f"{pair.key}.png", pair.image), (f"{pair.key}.txt", pair.caption.encode()))
    ]


def planted(image: bytes) -> dict[str, list[tuple[str, bytes]]]:
    """Reason -> members of one bad pair."""
    return {
        "too many pixels": [("bomb.png", bomb(27_000, 23_074)), ("bomb.txt", b"huge")],
        "caption too long": [("long.png", image), ("long.txt", b"x" * 10_000_000)],
        "empty caption": [("mute.png", image), ("mute.txt", b" \n")],
        "caption is not UTF-8": [("latin.png", image), ("latin.txt", b"\xff\xfe\xfa")],
        "broken image": [("half.png", image[: len(image) // 2]), ("half.txt", b"half")],
        "not an allowed format": [("pickle.pkl", b"cos\nsystem\n"), ("pickle.txt", b"run me")],
        "no image": [("blind.txt", b"nothing to see")],
        "no caption": [("silent.png", image)],
        "metadata too deep": [("deep.png", image), ("deep.txt", b"deep"), ("deep.json", b"[" * 90 + b"]" * 90)],
        "duplicate key": [("pair-0000.png", image), ("pair-0000.txt", b"again")],
    }


def test_every_planted_corrupt_member_is_counted_by_its_reason(
    pairs: list[Pair], encoder: Any, make_tar: Tar, tmp_path: Path
) -> None:
    bad = planted(pairs[3].image)
    members = good(pairs, 60) + [member for group in bad.values() for member in group]
    shard = make_tar(tmp_path / "x.tar", members)
    scan = Scan.run(shard, encoder, tmp_path / "out", ScanOptions(max_bad=0.5))
    assert scan.summary()["skipped"] == dict.fromkeys(bad, 1)
    listed = pq.read_table(tmp_path / "out" / "skipped.parquet").to_pylist()
    assert Counter(row["reason"] for row in listed) == Counter(list(bad))
    assert {row["key"] for row in listed} == {group[0][0].split(".")[0] for group in bad.values()}
    assert len(list(scan.rows())) == 60


def test_too_many_bad_pairs_stop_the_scan_after_listing_them(
    pairs: list[Pair], encoder: Any, make_tar: Tar, tmp_path: Path
) -> None:
    members = good(pairs, 60) + [m for group in planted(pairs[3].image).values() for m in group]
    shard = make_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"10 of 70 pairs are bad, more than the 5.0% allowed \(--max-bad\)"):
        Scan.run(shard, encoder, tmp_path / "out")
    assert len(pq.read_table(tmp_path / "out" / "skipped.parquet")) == 10


def test_captions_that_attack_whoever_shows_them(
    pairs: list[Pair], encoder: Any, make_tar: Tar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = [(f"evil{i}", text) for i, text in enumerate((SCRIPT, ANSI, "</script><!--", "\u202egnp.exe"))]
    members = good(pairs, 60)
    for name, text in hostile:
        members += [(f"{name}.png", pairs[7].image), (f"{name}.txt", text.encode())]
    scan = Scan.run(make_tar(tmp_path / "x.tar", members), encoder, tmp_path / "out")
    kept = {row["key"]: row["caption"] for row in scan.rows(["key", "caption"])}
    assert [kept[name] for name, _ in hostile] == [text for _, text in hostile], "the data keep what came"
    page = scan.report().read_text("utf-8")
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="text/plain" id="data">', "<script>"] and "onerror" not in page
    packed = re.search(r'id="data">([^<]*)</script>', page)
    assert packed is not None
    data = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    shown = dict(zip(data["key"], data["caption"], strict=True))
    assert shown["evil0"] == SCRIPT and not re.search(r"[\x00-\x1f\u202a-\u202e]", "".join(data["caption"]))
    print_summary(scan)
    assert "\x1b]" not in capsys.readouterr().out


def test_an_attack_is_named_as_it_is_written(
    pairs: list[Pair], encoder: Any, make_tar: Tar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a poison file calls an attack is text and no markup."""
    truth, name = tmp_path / "poison.parquet", "a[/x][red]b"
    write_records(truth, [PoisonRecord(pairs[0].key, name, "", "", "", 0, "was")])
    scan = Scan.run(make_tar(tmp_path / "a.tar", good(pairs, 60)), encoder, tmp_path / "out", poison=truth)
    print_summary(scan)
    assert name in capsys.readouterr().out


def test_a_name_is_a_key_and_never_a_path(pairs: list[Pair], encoder: Any, make_tar: Tar, tmp_path: Path) -> None:
    name = "../../etc/passwd"
    members = [*good(pairs, 60), (f"{name}.png", pairs[7].image), (f"{name}.txt", b"root")]
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    scan = Scan.run(make_tar(inside / "x.tar", members), encoder, inside / "out")
    assert name in {row["key"] for row in scan.rows(["key"])}
    from otcclip.curation.repair import repair

    repair(scan, inside / "csv", to="csv")
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(inside) for path in made)
    assert not any("passwd" in path.name for path in made)
