from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from otcclip.report import results_table
from otcclip.report.files import load_results
from otcclip.report.table import grid

Row = Callable[..., dict[str, Any]]


def shown(folder: Path, rows: list[dict[str, Any]], width: int = 80) -> str:
    (folder / "results.json").write_text(json.dumps(rows))
    out = io.StringIO()
    Console(file=out, width=width).print(results_table(folder))
    return out.getvalue().replace("\u00a0", " ")


def test_three_runs_fit_eighty_characters(tmp_path: Path, a_result: Row) -> None:
    text = shown(tmp_path, [a_result(d) for d in ("clip", "otcclip-paper", "otcclip")])
    assert "…" not in text and all(len(line) <= 80 for line in text.splitlines())
    for part in ("96.0 %", "95.0–97.0 %", "n = 1,000", "n = 16", "never poisoned 0 %", "900/1,000"):
        assert part in text
    assert "badnets 9/90" in text and "6 min 21 s" in text and "Peak memory" not in text and "Seed" not in text


def test_optional_columns_appear_with_their_data(tmp_path: Path, a_result: Row) -> None:
    rows = [a_result("clip", seed=1, peak_memory_mib=1500, n=1000), a_result("otcclip", seed=2, seconds=None)]
    text = shown(tmp_path, rows)
    assert "1.46 GiB" in text and "Seed" in text
    assert "44.0–50.2 %" in text  # the 95 % interval of 47.1 % of 1,000


def test_an_attack_missing_from_a_run_is_a_dash(tmp_path: Path, a_result: Row) -> None:
    rows = [
        a_result("clip"),
        a_result("otcclip", attacks={}, poison_kept={}, poison_total={}, pairs_kept=None),
    ]
    assert shown(tmp_path, rows).count("–") >= 4


def test_each_rate_is_judged_against_its_own_seed(tmp_path: Path, a_result: Row, a_rate: Any) -> None:
    rows = [
        a_result("clip", seed=0, attacks={"b": a_rate(0.95, 100)}),
        a_result("clip", seed=1, attacks={"b": a_rate(0.5, 100)}),
        a_result("otcclip", seed=0, attacks={"b": a_rate(0.0, 100)}),
        a_result("otcclip", seed=1, attacks={"b": a_rate(0.0, 100)}),
        a_result("otcclip", seed=2, attacks={"b": a_rate(0.0, 100)}),
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    cells = grid(load_results(tmp_path))
    column = [c.title for c in cells.columns].index("ASR b")
    verdicts = [row[column].verdict for row in cells.rows]
    assert verdicts == ["undefended", "undefended", "stopped", "not a test", "untested"]


def test_names_are_text_not_commands(tmp_path: Path, a_result: Row) -> None:
    name = "\x1b[31m[bold]evil\x1b]8;;x\x07\u202e"
    text = shown(tmp_path, [a_result(name, attacks={name: {"asr": 0.5, "n": 9}})], width=120)
    assert "[bold]evil" in text
    assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_a_model_never_poisoned_is_a_reference_and_wins_nothing(tmp_path: Path, a_result: Row) -> None:
    rows = [a_result(d) for d in ("clip", "otcclip", "clip-clean")]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    *_, defended, reference = grid(load_results(tmp_path)).rows
    assert {cell.verdict for cell in reference if cell.rate is not None} == {"never poisoned"}
    assert "never poisoned" not in {cell.verdict for cell in defended}
