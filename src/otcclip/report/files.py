"""A run folder, read and checked (docs/formats.md). Whatever is wrong is one line that names the file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.errors import UserError
from otcclip.report.fields import Fields
from otcclip.report.records import Cell, DefenseFiles, Epoch, JudgedPair, Result, Run, Shot
from otcclip.report.words import clean

_SHOWN = ("attack", "key", "image", "clean_image", "true_name", "target")
_GALLERY = (*_SHOWN, "clean_prediction", "prediction", "confidence")
_PAIRS = ("key", "image", "caption", "new_caption", "action", "suspicion", "attack", "true_name")
_POISON = ("key", "original_caption")
_NULLABLE = ("confidence", "suspicion", "new_caption")
ACTIONS = ("keep", "re-pair", "hold-back")
_MEMORY_UNITS = {"mib": 2**20, "mb": 10**6, "gib": 2**30, "gb": 10**9, "bytes": 1, "kib": 2**10}


def _peak_memory(fields: Fields) -> float | None:
    """Bytes of the first `peak_memory…` key; the unit is read off its name, bytes where it has none."""
    for name in fields.value:
        if name.startswith(("peak_memory", "peak_rss")):
            value = fields.number(name)
            return None if value is None else value * _MEMORY_UNITS.get(name.rsplit("_", 1)[-1].lower(), 1)
    return None


def _result(fields: Fields) -> Result:
    name = fields.text("defense")
    if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise fails(fields.where, f"defence '{clean(name, 60)}' is no folder's name")
    return Result(
        defense=name,
        seed=fields.count("seed") or 0,
        epochs=fields.count("epochs") or 0,
        top1=fields.need("top1", fields.share("top1")),
        top5=fields.need("top5", fields.share("top5")),
        attacks=fields.rates("attacks"),
        clean_asr=fields.shares("clean_asr"),
        seconds=fields.number("seconds"),
        pairs_kept=fields.count("pairs_kept"),
        pairs_total=fields.count("pairs_total"),
        poison_kept=fields.counts("poison_kept"),
        poison_total=fields.counts("poison_total"),
        test_images=fields.count("n"),
        peak_memory=_peak_memory(fields),
    )


def _epoch(fields: Fields) -> Epoch:
    return Epoch(
        epoch=fields.need("epoch", fields.count("epoch")),
        warm_up=fields.value.get("phase") == "warm-up",
        top1=fields.share("top1"),
        attacks=fields.rates("attacks"),
        kept=fields.count("kept"),
        poison_kept=fields.counts("poison_kept"),
        trust_auroc=fields.shares("trust_auroc"),
        repair_precision=fields.share("repair_precision"),
    )


def fails(where: str | Path, why: str) -> UserError:
    return UserError(f"{clean(where, 400)}: {why}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise fails(path, "not found; is this the folder of a finished run?") from None
    except (OSError, UnicodeDecodeError) as error:
        raise fails(path, f"cannot be read ({clean(error, 120)})") from None


def _parse(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = line + getattr(error, "lineno", 1) - 1
        raise fails(path, f"not valid JSON at line {at}") from None


def _history(path: Path) -> tuple[Epoch, ...]:
    lines = _read_text(path).split("\n")
    epochs = [
        _epoch(Fields(f"{path}: line {i}", _parse(path, line, i))) for i, line in enumerate(lines, 1) if line.strip()
    ]
    return tuple(sorted(epochs, key=lambda e: e.epoch))


def _table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    if not path.exists():
        raise fails(path, "not found; is this the folder of a finished run?")
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise fails(path, f"not a readable Parquet file ({clean(error, 120)})") from None
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise fails(path, f"column '{missing[0]}' is missing")
    return table


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows as dicts, images as lazy cells; a text column holds only text."""
    table = _table(path, columns)
    images = [c for c in columns if c.endswith("image")]
    for name in images:
        kind = table[name].type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)):
            raise fails(path, f"column '{name}': expected PNG bytes, found {clean(kind, 60)}")
    try:
        rows: list[dict[str, Any]] = table.select([c for c in columns if c not in images]).to_pylist()
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise fails(path, f"not readable ({clean(error, 120)})") from None
    for i, row in enumerate(rows):
        for name in ("confidence", "suspicion"):
            if name in row:
                row[name] = _finite(path, name, row[name])
        row.update({k: "" if v is None else str(v) for k, v in row.items() if k not in _NULLABLE})
        row.update({name: Cell(table[name], i) for name in images})
    return rows


def _finite(path: Path, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fails(path, f"column '{name}': expected numbers")
    return float(value) if math.isfinite(value) else None


def _pairs(path: Path) -> tuple[JudgedPair, ...] | None:
    if not path.exists():
        return None  # a defence that judges no pairs, such as plain CLIP, leaves no such file
    pairs = tuple(JudgedPair(**row) for row in _rows(path, _PAIRS))
    for pair in pairs:
        if pair.action not in ACTIONS:
            raise fails(path, f"action '{clean(pair.action, 40)}' is none of {', '.join(ACTIONS)}")
    return pairs


def _defense(folder: Path, name: str) -> DefenseFiles:
    gallery = tuple(Shot(**row) for row in _rows(folder / "gallery.parquet", _GALLERY))
    return DefenseFiles(name, _history(folder / "history.jsonl"), gallery, _pairs(folder / "pairs.parquet"))


def _poison(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    return {row["key"]: row["original_caption"] for row in _rows(path, _POISON)}


def load_results(run_dir: Path) -> tuple[Result, ...]:
    """results.json alone, in its own order."""
    path = run_dir / "results.json"
    if not run_dir.is_dir():
        raise fails(run_dir, "no such folder")
    rows = _parse(path, _read_text(path))
    if not isinstance(rows, list) or not rows:
        raise fails(path, "expected a list of runs")
    return tuple(_result(Fields(f"{path}: run {i}", row)) for i, row in enumerate(rows, 1))


def load_run(run_dir: Path) -> Run:
    """Everything a run left behind.

    Raises:
        UserError: a file is missing or is not what docs/formats.md says; the message names it.
    """
    results = load_results(run_dir)
    path = run_dir / "run.json"
    settings: Mapping[str, object] = Fields(str(path), _parse(path, _read_text(path))).value
    names = list(dict.fromkeys(result.defense for result in results))
    defenses = tuple(_defense(run_dir / name, name) for name in names)
    return Run(run_dir, settings, results, defenses, _poison(run_dir / "poison.parquet"))
