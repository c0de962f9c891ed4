"""One pair's image is found again by itself, wherever it lies."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from otcclip.curation.units import INDEX, INDEXED, SPOOL, Item, Unit, _index, find_units
from otcclip.data import Pair
from otcclip.data.decode import Box
from otcclip.data.readers import ReadOptions
from otcclip.data.table import PairTable, Row, TableBuilder
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


@pytest.fixture
def parquet(pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forty pairs in a folder named relatively to the working directory, which is `tmp_path / "here"`."""
    (tmp_path / "here" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    columns = {name: [getattr(pair, name) for pair in pairs[:40]] for name in ("key", "image", "caption")}
    pq.write_table(pa.table(columns), "data/pairs.parquet")
    return "data"


def more(source: str, pairs: list[Pair]) -> None:
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("key", "image", "caption")}
    pq.write_table(pa.table(columns), f"{source}/more.parquet")


def test_a_source_that_changed_since_it_was_indexed_is_one_line(
    parquet: str, pairs: list[Pair], tmp_path: Path
) -> None:
    folder = tmp_path / "scan"
    first = find_units(parquet, "auto", folder)
    assert find_units(parquet, "auto", folder) == first and first[0].rows == (0, 40)
    more(parquet, pairs[40:48])
    with pytest.raises(UserError, match=r"^data: changed since it was indexed; name another --out"):
        find_units(parquet, "auto", folder)
    assert find_units(parquet, "auto", tmp_path / "another")[0].rows == (0, 48)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_an_index_of_which_nobody_knows_the_source_is_refused(text: str | None, parquet: str, tmp_path: Path) -> None:
    find_units(parquet, "auto", tmp_path / "scan")
    path = tmp_path / "scan" / INDEXED
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"^data: index\.json .* missing or damaged.*; name another --out"):
        find_units(parquet, "auto", tmp_path / "scan")


def test_a_source_that_changes_while_it_is_indexed_is_one_line(
    parquet: str, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TableBuilder.build

    def changed(self: TableBuilder) -> PairTable:
        more(parquet, pairs[40:48])
        return real(self)

    monkeypatch.setattr(TableBuilder, "build", changed)
    with pytest.raises(UserError, match="changed since it was indexed"):
        find_units(parquet, "auto", tmp_path / "scan")


def test_an_index_and_its_spool_may_be_moved_and_read_from_elsewhere(
    parquet: str, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_units(parquet, "auto", Path("scan"))
    assert sorted(path.name for path in Path("scan").iterdir()) == [INDEX, SPOOL, INDEXED, "skipped"]
    shutil.move("scan", tmp_path / "moved")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    for folder in (tmp_path / "moved", Path("../moved")):  # the source is not to be seen from here, nor its format
        found = [item.pair for unit in find_units(parquet, "auto", folder) for item in items(unit)]
        assert [(pair.key, pair.image) for pair in found] == [(pair.key, pair.image) for pair in pairs[:40]]


def test_jobs_that_index_at_once_leave_one_index(
    parquet: str, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second job begins and ends while the first has read all and written nothing."""
    real, folder = TableBuilder.build, tmp_path / "scan"

    def second(self: TableBuilder) -> PairTable:
        monkeypatch.setattr(TableBuilder, "build", real)
        find_units(parquet, "auto", folder)
        return real(self)

    monkeypatch.setattr(TableBuilder, "build", second)
    for _ in range(2):
        found = [item.pair.image for unit in find_units(parquet, "auto", folder) for item in items(unit)]
        assert found == [pair.image for pair in pairs[:40]]
    assert not list(folder.glob(f".{SPOOL}*"))


def test_a_job_that_indexes_late_leaves_alone_what_another_reads(
    parquet: str, pairs: list[Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked before there was an index; now another job encodes from that index while it reads the source."""
    folder, real, looked = tmp_path / "scan", TableBuilder.extend, []
    units = find_units(parquet, "auto", folder)

    def extend(self: TableBuilder, rows: Iterator[Row]) -> TableBuilder:
        def watched() -> Iterator[Row]:
            for i, row in enumerate(rows):
                if i == 20:
                    looked.append([item.pair.image for unit in units for item in items(unit)])
                yield row

        return real(self, watched())

    monkeypatch.setattr(TableBuilder, "extend", extend)
    _index(parquet, "parquet", folder, ReadOptions())
    assert looked == [[pair.image for pair in pairs[:40]]]
