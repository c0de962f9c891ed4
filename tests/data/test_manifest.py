"""A manifest drops, re-captions and keeps by key, and is refused when it cannot be trusted."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from otcclip.data import Pair
from otcclip.data.manifest import apply_manifest, read_manifest
from otcclip.errors import UserError


def write(path: Path, rows: list[tuple[str, str, str | None]]) -> Path:
    keys, actions, captions = zip(*rows, strict=True)
    columns = {"key": keys, "action": actions, "new_caption": captions, "anything": [1] * len(rows)}
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


def test_keep_drop_and_re_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", [("a", "keep", None), ("b", "re-pair", "new"), ("c", "drop", None)])
    pairs = [Pair(key, key.encode(), f"was {key}", "label", {"x": "y"}) for key in "cab"]
    assert list(apply_manifest(pairs, path)) == [
        Pair("a", b"a", "was a", "label", {"x": "y"}),
        Pair("b", b"b", "new", "label", {"x": "y"}),
    ]
    assert len(read_manifest(path)) == 3


def test_a_pair_that_was_never_judged_is_refused(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path / "m.parquet", [("a", "keep", None)]))
    with pytest.raises(UserError, match="says nothing of pair 'z'"):
        list(manifest.apply([Pair("z\x1b[2J", b"", "c")]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "hold", None)], "action 'hold' is none of keep, re-pair, drop"),
        ([("a", "re-pair", None)], "re-paired without a new caption"),
        ([("a", "keep", None), ("a", "keep", None)], "a key is given twice"),
        ([("a", "keep", None), ("a", "drop", None)], "a key is given twice"),
    ],
)
def test_what_makes_no_sense_is_one_line(rows: list[tuple[str, str, str | None]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(write(tmp_path / "m.parquet", rows))


def test_what_is_no_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        read_manifest(tmp_path / "none.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "m.parquet")
    with pytest.raises(UserError, match="lacks the columns action, new_caption"):
        read_manifest(tmp_path / "m.parquet")
