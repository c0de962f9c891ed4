"""One pair's image is found again by itself, wherever it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from otcclip.curation.units import Item, Unit, find_units
from otcclip.data import Pair
from otcclip.data.decode import Box
from otcclip.data.table import Row, TableBuilder
from otcclip.errors import UserError


def items(unit: Unit) -> list[Item]:
    return list(unit.pairs(lambda skipped: pytest.fail(str(skipped))))


def again(unit: Unit, found: list[Item]) -> list[tuple[bytes, Box | None]]:
    digests = [hashlib.sha256(item.pair.image).hexdigest() for item in found]
    return list(unit.images([item.at for item in found], digests))


def test_an_image_of_a_shard_again(shards: Path, tmp_path: Path) -> None:
    for unit in find_units(shards, "auto", tmp_path):
        found = items(unit)
        assert len(found) == 120
        assert again(unit, found[::17]) == [(item.pair.image, None) for item in found[::17]]


def test_an_image_that_is_another_is_one_line(shards: Path, tmp_path: Path) -> None:
    unit = find_units(shards, "auto", tmp_path)[0]
    first, second = items(unit)[:2]
    with pytest.raises(UserError, match="changed since it was scanned"):
        list(unit.images([first.at], [hashlib.sha256(second.pair.image).hexdigest()]))


def test_a_shard_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: changed since it was scanned \(.*No such file"):
        list(Unit("00000", str(tmp_path / "gone.tar")).images([(512, 10)], [""]))


def test_an_image_of_an_index_again_with_its_region(pairs: list[Pair], tmp_path: Path) -> None:
    rows = []
    for i, pair in enumerate(pairs[:6]):
        (tmp_path / f"{i}.png").write_bytes(pair.image)
        rows.append(Row(pair.key, pair.caption, str(tmp_path / f"{i}.png"), box=(i, 2, 30, 20) if i % 2 else None))
    TableBuilder().extend(iter(rows)).build().save(tmp_path / "index.arrow")
    unit = Unit("rows-000000002", str(tmp_path / "index.arrow"), (2, 6))
    found = items(unit)
    assert [item.pair.key for item in found] == [pair.key for pair in pairs[2:6]]
    assert again(unit, found) == [(pairs[i].image, rows[i].box) for i in range(2, 6)]
    (tmp_path / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png: changed since it was scanned \(no image\)"):
        again(unit, found)
