"""State of pairs by key: the same records whatever the order, the subset or the process that asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from otcclip.data.state import StateTable
from otcclip.errors import UserError

KEYS = [f"shard-{i // 10}/{i:04d}" for i in range(100)]


def test_survives_shuffling_sharding_and_reopening(tmp_path: Path) -> None:
    table = StateTable.create(tmp_path / "trust.bin", KEYS, suspicion="f4", action="i1", caption="i4")
    order = np.random.default_rng(0).permutation(100)
    for part in np.array_split(order, 7):  # shards in any order
        table.put([KEYS[i] for i in part], suspicion=part / 100, caption=part * 3)
    table.put(KEYS[:5], action=2)
    table.flush()
    again = StateTable.open(tmp_path / "trust.bin")
    got = again.get([KEYS[i] for i in order[:20]])
    np.testing.assert_allclose(got["suspicion"], order[:20] / 100, rtol=1e-6)
    assert got["caption"].tolist() == (order[:20] * 3).tolist()
    assert again.get(KEYS)["action"].tolist() == [2] * 5 + [0] * 95


def test_bytes_a_pair_are_as_stated(tmp_path: Path) -> None:
    StateTable.create(tmp_path / "t.bin", KEYS, suspicion="f4", action="i1", caption="i4")
    size = (tmp_path / "t.bin").stat().st_size
    StateTable.create(tmp_path / "u.bin", KEYS[:50], suspicion="f4", action="i1", caption="i4")
    assert size - (tmp_path / "u.bin").stat().st_size == 50 * 17


def test_strangers_and_twins(tmp_path: Path) -> None:
    table = StateTable.create(tmp_path / "t.bin", KEYS, action="i1")
    assert table.rows(["nobody", KEYS[7]]).tolist() == [-1, 7]
    with pytest.raises(KeyError, match="nobody"):
        table.get([KEYS[0], "nobody"])
    with pytest.raises(KeyError, match="nobody"):
        table.put(["nobody"], action=1)
    with pytest.raises(UserError, match="two pairs have one key"):
        StateTable.create(tmp_path / "u.bin", [*KEYS, KEYS[3]], action="i1")
    assert not (tmp_path / "u.bin").exists()


@pytest.mark.parametrize("content", [b"", b"otcclip-state-1\n", b'otcclip-state-1\n[["key", "<u8"]]\nabc', b"x" * 99])
def test_a_damaged_table_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as state of pairs"):
        StateTable.open(tmp_path / "t.bin")


def test_an_empty_table(tmp_path: Path) -> None:
    assert len(StateTable.create(tmp_path / "t.bin", [], action="i1")) == 0
