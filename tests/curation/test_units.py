"""One pair's image is found again by itself, wherever it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from otcclip.curation.units import Item, Unit, find_units
from otcclip.data import Pair
from otcclip.data.decode import BadPair
from otcclip.data.table import Row, TableBuilder
from otcclip.errors import UserError


def items(unit: Unit) -> list[Item]:
    return list(unit.pairs(lambda skipped: pytest.fail(str(skipped))))


def test_an_image_of_a_shard_again(shards: Path, tmp_path: Path) -> None:
    for unit in find_units(shards, "auto", tmp_path):
        found = items(unit)
        assert len(found) == 120
        for item in found[::17]:
            assert unit.image(item.at) == (item.pair.image, None)


def test_a_shard_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: No such file"):
        Unit("00000", str(tmp_path / "gone.tar")).image((512, 10))


def test_an_image_of_an_index_again_with_its_region(pairs: list[Pair], tmp_path: Path) -> None:
    rows = []
    for i, pair in enumerate(pairs[:6]):
        (tmp_path / f"{i}.png").write_bytes(pair.image)
        rows.append(Row(pair.key, pair.caption, str(tmp_path / f"{i}.png"), box=(i, 2, 30, 20) if i % 2 else None))
    TableBuilder().extend(iter(rows)).build().save(tmp_path / "index.arrow")
    unit = Unit("rows-000000002", str(tmp_path / "index.arrow"), (2, 6))
    found = items(unit)
    assert [item.pair.key for item in found] == [pair.key for pair in pairs[2:6]]
    for i, item in enumerate(found, start=2):
        assert unit.image(item.at) == (pairs[i].image, rows[i].box)
    (tmp_path / "3.png").unlink()
    with pytest.raises(BadPair):
        unit.image(found[1].at)
