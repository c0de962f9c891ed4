"""A missing or broken file is one clear line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from otcclip.errors import UserError
from otcclip.report import results_table, write_report
from otcclip.report.files import load_results, load_run

Make = Callable[..., Path]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text
    return text


FILES = ("results.json", "run.json", "poison.parquet", "clip/history.jsonl", "otcclip/gallery.parquet")


@pytest.mark.parametrize("name", [*FILES, "otcclip/pairs.parquet"])
@pytest.mark.parametrize("damage", ["cut", "binary", "empty"])
def test_a_broken_file_is_named(make_run: Make, name: str, damage: str) -> None:
    run = make_run()
    path = run / name
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "binary": b"\xff\xfe\x00PAR1" * 9, "empty": b""}[damage])
    if name.endswith("jsonl") and damage == "empty":
        write_report(run)  # no epochs is a run without curves, not a broken one
        return
    with pytest.raises(UserError) as error:
        write_report(run)
    assert name in one_line(error)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        results_table(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top1": 1.7}, "'top1'"),
        ({"top1": None}, "'top1'"),
        ({"top1": "high"}, "a number"),
        ({"top1": True}, "a number"),
        ({"seconds": 10**400}, "ordinary size"),
        ({"pairs_kept": -1}, "a count"),
        ({"defense": ""}, "'defense'"),
        ({"defense": "../../etc"}, "no folder's name"),
        ({"attacks": []}, "expected an object"),
        ({"attacks": {"badnets": {"n": 3}}}, "'asr'"),
        ({"attacks": {"badnets\x1b[31m": {"asr": float("nan"), "n": 3}}}, "'asr'"),
    ],
)
def test_a_bad_field_is_named(
    tmp_path: Path, a_result: Callable[..., dict[str, Any]], change: dict[str, Any], says: str
) -> None:
    (tmp_path / "results.json").write_text(json.dumps([a_result("clip", **change)]))
    with pytest.raises(UserError) as error:
        load_results(tmp_path)
    assert says in one_line(error) and "results.json: run 1" in one_line(error)


@pytest.mark.parametrize("text", ["{}", "[]", "[3]", "[" * 100_000])
def test_results_must_be_a_list_of_objects(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        load_results(tmp_path)


def test_a_missing_interval_is_computed(tmp_path: Path, a_result: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "results.json").write_text(json.dumps([a_result("clip", attacks={"t": {"asr": 0.0, "n": 16}})]))
    rate = load_results(tmp_path)[0].attacks["t"]
    assert rate.high == pytest.approx(0.1936, abs=1e-4)


@pytest.mark.parametrize(("key", "size"), [("peak_memory_mib", 2**21), ("peak_memory", 2), ("peak_rss_gib", 2**31)])
def test_peak_memory_units(tmp_path: Path, a_result: Callable[..., dict[str, Any]], key: str, size: float) -> None:
    (tmp_path / "results.json").write_text(json.dumps([a_result("clip", **{key: 2})]))
    assert load_results(tmp_path)[0].peak_memory == size


def replace_column(path: Path, name: str, values: pa.Array | None) -> None:
    table = pq.read_table(path)
    index = table.column_names.index(name)
    table = table.remove_column(index) if values is None else table.set_column(index, name, values)
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("file", "column", "value", "says"),
    [
        ("gallery", "target", None, "column 'target' is missing"),
        ("gallery", "image", "not bytes", "expected PNG bytes"),
        ("gallery", "confidence", "much", "expected numbers"),
        ("pairs", "action", "explode\x1b[2J", "none of keep, re-pair, hold-back"),
    ],
)
def test_a_bad_column_is_named(make_run: Make, file: str, column: str, value: str | None, says: str) -> None:
    run = make_run("otcclip", images=2)
    path = run / "otcclip" / f"{file}.parquet"
    rows = pq.read_metadata(path).num_rows
    replace_column(path, column, None if value is None else pa.array([value] * rows))
    with pytest.raises(UserError) as error:
        load_run(run)
    assert says in one_line(error) and path.name in one_line(error)


def test_text_that_is_not_utf8_is_a_broken_file(make_run: Make) -> None:
    run = make_run("otcclip", images=2)
    path = run / "otcclip" / "pairs.parquet"
    raw = pa.array([b"\xff\xfe"] * pq.read_metadata(path).num_rows, pa.binary()).view(pa.string())
    replace_column(path, "caption", raw)
    with pytest.raises(UserError, match=r"pairs\.parquet"):
        load_run(run)


def test_what_may_be_absent_may_be_absent(make_run: Make) -> None:
    def edit(kind: str, row: dict[str, Any]) -> None:
        if kind == "gallery":
            row["confidence"] = None
        if kind == "pairs":
            row.update(suspicion=float("nan"), new_caption=None, true_name=None)

    run = make_run(edit=edit, images=3)
    loaded = load_run(run)
    assert loaded.defenses[0].pairs is None and loaded.defenses[1].pairs is not None
    assert all(p.suspicion is None and p.true_name == "" for p in loaded.defenses[1].pairs)
    assert loaded.defenses[0].epochs[3].top1 is None and loaded.defenses[1].epochs[0].warm_up
    (run / "poison.parquet").unlink()
    assert load_run(run).poison is None
    assert write_report(run).exists()


def test_the_lowest_seed_speaks_and_the_house_defence_is_the_subject(
    make_run: Make, a_result: Callable[..., dict[str, Any]]
) -> None:
    rows = [a_result(d, seed=s) for s in (2, 1) for d in ("clip", "otcclip", "roclip")]
    run = load_run(make_run(rows=rows, images=2))
    house = run.defended()
    assert house is not None and (house.defense, house.seed) == ("otcclip", 1)
