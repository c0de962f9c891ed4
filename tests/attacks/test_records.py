"""poison.parquet: what goes in comes out; what is no poison file is one clear line."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.attacks import PoisonRecord, read_records, write_records
from otcclip.errors import UserError

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
record = st.builds(PoisonRecord, words, words, words, words, words, st.integers(0, 2**62), words)


@settings(max_examples=30, deadline=None)
@given(st.lists(record, max_size=5))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[PoisonRecord]) -> None:
    path = tmp_path_factory.mktemp("records") / "poison.parquet"
    write_records(path, records)
    assert read_records(path) == tuple(records)
    assert [p.name for p in path.parent.iterdir()] == ["poison.parquet"]


def test_columns_are_those_of_the_format(tmp_path) -> None:
    write_records(tmp_path / "p", [])
    names = ["key", "attack", "trigger", "location", "target", "seed", "original_caption"]
    assert pq.read_schema(tmp_path / "p").names == names


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "poison.parquet"
    old = [PoisonRecord("k", "a", "", "", "t", 0, "c")]
    write_records(path, old)

    def full(table: pa.Table, handle) -> None:
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("otcclip.attacks.records.pq.write_table", full)
    with pytest.raises(UserError, match="No space left"):
        write_records(path, [])
    assert read_records(path) == tuple(old)
    assert [p.name for p in tmp_path.iterdir()] == ["poison.parquet"]


def test_what_is_no_poison_file_is_one_line(tmp_path) -> None:
    folder = tmp_path / "folder"
    write_records(folder / "poison.parquet", [])
    with pytest.raises(UserError, match="cannot be read"):
        read_records(folder)
    (tmp_path / "text").write_text("key,attack")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other")
    columns = {name: ["x"] for name in ("key", "attack", "trigger", "location", "target", "original_caption")}
    pq.write_table(pa.table({**columns, "seed": ["none"]}), tmp_path / "types")
    for name, message in [
        ("absent", "cannot be read"),
        ("text", "cannot be read"),
        ("other", "lacks the columns attack, trigger"),
        ("types", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            read_records(tmp_path / name)
        assert "\n" not in str(caught.value)
