"""One cell of the matrix, in a process of its own: train it, judge it, write `cell.json`.

A cell's folder is a run's folder (docs/formats.md). `cell.json` is written last; a cell without it is not finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from otcclip.attacks import read_records, write_records
from otcclip.bench.plan import Cell
from otcclip.data.atomic import write_json
from otcclip.evaluation.intervals import Rate
from otcclip.models import load_two_tower, open_clip_model_size
from otcclip.training.experiment import finished_result, make_setting, run_experiment
from otcclip.training.judge import Judge
from otcclip.training.setting import Setting
from otcclip.training.utility import add_utility, missing_measures

CELL, NEVER_POISONED, TRUTH = "cell.json", "never_poisoned.json", "poison.parquet"


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train the cell, or take it up where it was cut off; returns the object of its `cell.json`.

    Raises:
        UserError: as `run_experiment`.
    """
    truth = cell.folder.parent / TRUTH

    def write_truth(setting: Setting) -> None:
        write_records(truth, setting.records)

    run_experiment(cell.run, on_setting=write_truth)
    result = add_utility(cell.run, cell.utility)
    found = cell_object(cell, result, _targets(truth))
    write_json(cell.folder / CELL, found)
    # A finished run is never resumed, and a hundred cells of 94 MB each are a full disk.
    shutil.rmtree(cell.folder / "checkpoint", ignore_errors=True)
    return found


def finished_cell(cell: Cell) -> dict[str, Any] | None:
    """The object of the cell's `cell.json`; None where it is not finished, of another spec, or lacks a measure."""
    found = _read(cell.folder / CELL) if finished_result(cell.run) is not None else None
    return None if found is None or missing_measures(found, cell.utility) else found


def cell_object(cell: Cell, result: dict[str, Any], targets: dict[str, str | None]) -> dict[str, Any]:
    """A run's result as a cell: clip_benchmark's words, what was attacked and defended, an interval for each rate."""
    accuracy = {name: Rate.of(round(share * result["n"]), result["n"]) for name, share in result["metrics"].items()}
    start = result.get("start") or {}
    return {
        "dataset": result["dataset"],
        "model": result["model"],
        "pretrained": result["pretrained"],
        "task": result["task"],
        "metrics": result["metrics"],
        "intervals": {name: [rate.low, rate.high] for name, rate in accuracy.items()},
        "n": result["n"],
        "attack": cell.group.label,
        "planted": list(cell.group.attacks),
        "poison_rate": cell.group.rate,
        "defense": cell.defense.label,
        "seed": cell.seed,
        "epochs": cell.run.epochs,
        "attacks": {name: {**rate, "target": targets.get(name)} for name, rate in result["attacks"].items()},
        "seconds": round(result["seconds"] + start.get("seconds", 0.0), 1),
        "peak_memory_mib": result["peak_memory_mib"],
        **{k: result[k] for k in ("pairs_kept", "pairs_repaired", "pairs_total", "poison_kept", "poison_total")},
        "utility": result.get("utility", {}),
    }


def _targets(truth: Path) -> dict[str, str | None]:
    """The class each attack argues for; None for an attack with a class for each image."""
    classes: dict[str, set[str]] = {}
    for record in read_records(truth):
        classes.setdefault(record.attack, set()).add(record.target)
    return {name: next(iter(found)) if len(found) == 1 else None for name, found in classes.items()}


def try_never_poisoned(clean: Cell, cell: Cell) -> dict[str, Any]:
    """Try the attacks of `cell` on the finished model of `clean`, trained alike on pairs without poison.

    Writes `never_poisoned.json` into the folder of `cell` and returns its object: the rates that no attack has earned.
    """
    model = load_two_tower(clean.folder, clean.run.model).eval()
    setting = make_setting(cell.run, open_clip_model_size(cell.run.model))
    judge = Judge(setting.split.test, setting.split.names, setting.attacks, setting.plans)
    found = {"defense": clean.defense.label, "seed": clean.seed, **judge.evaluate(model)}
    write_json(cell.folder / NEVER_POISONED, found)
    return found


def never_poisoned(cell: Cell) -> dict[str, Any] | None:
    """The object of the cell's `never_poisoned.json`; None where there is none."""
    return _read(cell.folder / NEVER_POISONED)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None
