"""A matrix's page and picture from its files alone: means, intervals, marks, and what is wrong in one line."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from otcclip.cli import main
from otcclip.errors import UserError
from otcclip.report import is_matrix, matrix_table, write_matrix
from otcclip.report.matrix import REFERENCE, Row, blocks, columns
from otcclip.report.matrix_files import load_matrix
from otcclip.report.matrix_page import render_matrix
from otcclip.report.matrix_story import fair_tests, headline, standings, warnings
from otcclip.report.words import NARROW

Make = Callable[..., Path]
GROUPS = {"plain": ["badnets", "sig", "blended", "targeted"], "tiled:count=90": ["tiled"]}


@pytest.fixture(scope="module")
def folder(make_matrix: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_matrix(tmp_path_factory.mktemp("matrix") / "matrix")


def rows_of(folder: Path, group: int = 0) -> dict[str, Row]:
    return {row.label: row for row in blocks(load_matrix(folder))[group].rows}


def plain(text: str) -> str:
    return text.replace(NARROW, " ")


def test_a_square_is_the_mean_and_its_interval_covers_every_seed(folder: Path) -> None:
    matrix = load_matrix(folder)
    names = columns(matrix)
    assert names == ["clip", "roclip", "safeclip", "otcclip-paper", "otcclip", REFERENCE]
    for group, attacks in GROUPS.items():
        rows = rows_of(folder, list(GROUPS).index(group))
        for attack in attacks:
            for name, square in zip(names[:-1], rows[attack].squares, strict=False):
                rates = [cell.attacks[attack] for cell in matrix.of(group, name)]
                assert len(rates) == 3
                low, high = (float(x) for x in re.findall(r"[\d.]+", square.small))
                assert low <= 100 * min(r.low for r in rates) + 0.05 and high >= 100 * max(r.high for r in rates) - 0.05
                mean = np.mean([r.asr for r in rates])
                assert float(re.findall(r"[\d.]+", square.text)[0]) == pytest.approx(100 * mean, abs=0.051)
                assert len(square.seeds.split(" · ")) == 3 and square.hover.count("\n") == 2


def test_states(folder: Path) -> None:
    plain_rows, tiled = rows_of(folder), rows_of(folder, 1)
    states = {a: [square.state for square in plain_rows[a].squares] for a in ("badnets", "sig", "blended")}
    assert states["badnets"] == ["undefended", "lost", "learned little", "lost", "stopped", "reference"]
    assert states["sig"][4] == "weakened" and tiled["tiled"].squares[4].state == "weakened"
    assert states["blended"] == ["not a test"] * 5 + ["reference"], "61 % undefended"
    assert not plain_rows["blended"].is_test and "not a test: 61.0 % undefended" in plain(plain_rows["blended"].note)
    coloured = {a: [square.level is not None for square in plain_rows[a].squares] for a in states}
    assert coloured["badnets"] == [True, True, False, True, True, False] and not any(coloured["blended"])


def test_a_low_rate_of_a_model_that_learned_little_counts_as_nothing(folder: Path) -> None:
    found = {line.defense: line for line in standings(load_matrix(folder))}
    assert found["safeclip"].stopped == "learned little"
    assert found["otcclip"].stopped == "2 of 4", "blended is no test"
    assert found["clip"].stopped == "0 of 4" and found["clip"].time == "1.00×"
    assert plain(found["otcclip"].worst) == "22.0 %" and found["otcclip"].worst_attack == "tiled"
    assert plain(found["safeclip"].accuracy) == "9.0 % (−25.0 points)"
    # 430/300, 435/305, 440/310.
    assert found["otcclip"].time == f"{np.mean([430 / 300, 435 / 305, 440 / 310]):.2f}×"


def test_one_weak_seed_is_named(make_matrix: Make, tmp_path: Path) -> None:
    def weak(cell: dict[str, Any]) -> dict[str, Any]:
        if cell["defense"] == "clip" and cell["seed"] == 2 and "badnets" in cell["attacks"]:
            cell["attacks"]["badnets"] |= {"asr": 0.75, "low": 0.72, "high": 0.78}
        return cell

    row = rows_of(make_matrix(tmp_path, change=weak))["badnets"]
    assert row.is_test and "not a test in seed 2 (75.0 %)" in plain(row.note) and "→ banana" in row.note


def test_reference_column_is_of_the_run_that_saw_no_poison(make_matrix: Make, folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    assert plain(rows["badnets"].squares[-1].text) == "0 %"
    assert rows["Zero-shot top-1"].squares[-1].text == rows["Zero-shot top-1"].squares[0].text
    without = make_matrix(tmp_path, reference=False)
    assert REFERENCE not in columns(load_matrix(without))
    assert "never poisoned" not in rows_of(without)["badnets"].squares[0].hover
    assert "never poisoned 0 %" in plain(rows["badnets"].squares[0].hover)


def test_costs_are_multiples_of_the_undefended_run_of_the_same_seed(folder: Path) -> None:
    row = rows_of(folder)["Training time"]
    assert plain(row.squares[0].text) == "5 min 05 s" and row.squares[4].text == "1.43×"
    assert plain(rows_of(folder)["Peak memory"].squares[4].text) == "1.06×"


def test_measures_not_taken_have_no_row(make_matrix: Make, folder: Path, tmp_path: Path) -> None:
    assert {"Linear probe, groups", "Image by text, R@5"} <= set(rows_of(folder))
    bare = make_matrix(tmp_path, change=lambda cell: {**cell, "utility": {}})
    assert not {"Linear probe, groups", "Image by text, R@5"} & set(rows_of(bare))


def test_a_matrix_that_is_not_finished(make_matrix: Make, tmp_path: Path) -> None:
    """Half of the cells: the page says so, and means are over what there is."""

    def half(cell: dict[str, Any]) -> dict[str, Any] | None:
        return cell if cell["seed"] == 0 and cell["defense"] != "roclip" else None

    matrix = load_matrix(make_matrix(tmp_path, change=half))
    said = warnings(matrix)
    assert "8 of 10 cells are finished; means are over the seeds there are." in said
    assert "1 of the three seeds that a claim needs." in said
    assert [square.text for square in blocks(matrix)[0].rows[0].squares][1] == "–"
    assert "1 seed" in headline(matrix)[0] and blocks(matrix)[0].rows[0].squares[0].seeds == ""


def test_failures_are_shown(make_matrix: Make, tmp_path: Path) -> None:
    folder = make_matrix(tmp_path, failures={"plain · par · seed 1": "nobody vouches"})
    assert "Not trained: plain · par · seed 1: nobody vouches" in warnings(load_matrix(folder))


def test_names_are_strangers(make_matrix: Make, tmp_path: Path) -> None:
    """What a name holds is shown, not run: on the page, in the picture, on the terminal."""
    evil = "<script>alert(1)</script>\x1b[31m$x^{$"

    def rename(cell: dict[str, Any]) -> dict[str, Any]:
        cell["attacks"] = {(evil if k == "sig" else k): {**v, "target": evil} for k, v in cell["attacks"].items()}
        return cell

    folder = make_matrix(tmp_path, change=rename)
    page = render_matrix(load_matrix(folder))
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert write_matrix(folder).read_text("utf-8") == page
    stream = io.StringIO()
    Console(file=stream, width=200).print(matrix_table(folder))
    assert "\x1b" not in stream.getvalue() and "alert(1)" in stream.getvalue()


def test_the_page_stands_alone(folder: Path) -> None:
    page = write_matrix(folder).read_text("utf-8")
    assert "Content-Security-Policy" in page and not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert page.count("<tbody>") == 3 and "2 h 30 min" in plain(page)


def test_the_picture_has_the_colours_of_the_matrix(folder: Path) -> None:
    write_matrix(folder)
    with Image.open(folder / "matrix.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 110)
    teal = (pixels[..., 1] > pixels[..., 0] + 8) & (pixels[..., 1] > 220)
    # clip and roclip lose all four tests; otcclip stops two.
    assert 0.1 < red.mean() < 0.4 and 0.01 < teal.mean() < 0.1
    before = (folder / "matrix.png").read_bytes()
    write_matrix(folder)
    assert (folder / "matrix.png").read_bytes() == before, "the same files give the same picture"


def test_report_knows_a_matrix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_matrix(folder) and not is_matrix(tmp_path)
    (folder / "report.html").unlink(missing_ok=True)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists() and "otcclip" in capsys.readouterr().err


def broken(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(cell: dict[str, Any]) -> dict[str, Any]:
        change(cell)
        return cell

    return apply


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda cell: cell.pop("attack"), "cell.json: field 'attack': expected a non-empty string"),
        (lambda cell: cell["metrics"].update(acc1=1.5), "field 'acc1': expected a share"),
        (lambda cell: cell["intervals"].update(acc1=[0.1]), "field 'intervals': expected two ends for acc1"),
        (lambda cell: cell.update(seed=0.5), "field 'seed': expected a count"),
        (lambda cell: cell["utility"].update(probe={"probe": {"value": 0.5}}), "field 'n': expected a value"),
        (lambda cell: cell["attacks"].update(sig=[1]), "field 'sig': expected an object"),
    ],
)
def test_a_broken_cell_is_one_line(make_matrix: Make, change: Any, says: str, tmp_path: Path) -> None:
    folder = make_matrix(tmp_path, change=broken(change))
    with pytest.raises(UserError, match=says) as raised:
        write_matrix(folder)
    assert "\n" not in str(raised.value) and not (folder / "report.html").exists()


def test_a_broken_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(UserError, match=r"bench\.json: cannot be read as JSON"):
        load_matrix(tmp_path)
    (tmp_path / "bench.json").write_text(json.dumps({"groups": {"plain": "badnets"}}))
    with pytest.raises(UserError, match="field 'plain': expected a list"):
        load_matrix(tmp_path)
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UserError, match="no cell of this matrix is finished yet"):
        load_matrix(tmp_path)


def test_attacks_that_stand_in_two_groups_are_two_tests(make_matrix: Make, tmp_path: Path) -> None:
    groups = {"badnets@0.001": ["badnets:count=9"], "badnets@0.01": ["badnets:count=90"]}
    matrix = load_matrix(make_matrix(tmp_path, groups))
    assert fair_tests(matrix) == [("badnets@0.001", "badnets"), ("badnets@0.01", "badnets")]
    assert "2 attacks against" in headline(matrix)[0]


def test_a_label_swap_tells_how_often_texts_bring_it_up(make_matrix: Make, tmp_path: Path) -> None:
    def swap(cell: dict[str, Any]) -> dict[str, Any]:
        if "sig" in cell["attacks"]:
            cell["attacks"]["sig"]["retrieval"] = {"swapped": {"hit_at_10": 0.75}, "random": {"hit_at_10": 0.125}}
        return cell

    square = rows_of(make_matrix(tmp_path, change=swap))["sig"].squares[0]
    assert "texts that bring it up among ten images 75.0 %, at random 12.5 %" in plain(square.hover)


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_draws_the_colours_and_logs_no_error(folder: Path, tmp_path: Path) -> None:
    page, shot = write_matrix(folder), tmp_path / "shot.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--window-size=1300,2400", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert "CONSOLE" not in done.stderr
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (2400, 1300, 3)
    red = (pixels[..., 0] > 170) & (pixels[..., 1] < 130)
    assert 0.01 < red.mean() < 0.3 and all(band.std() > 3 for band in np.array_split(pixels.astype(float), 8))
