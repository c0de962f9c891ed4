"""A scan's folder, read and checked (docs/formats.md): summary, rows, gallery."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.errors import UserError
from otcclip.report.words import clean

MOST_ROWS = 100_000
ACTIONS = ("keep", "re-pair", "drop")
NEEDED = (
    "key",
    "caption",
    "p_value",
    "lie",
    "copies",
    "disputed",
    "doubtful_word",
    "best_caption",
    "action",
    "new_caption",
)


@dataclass(frozen=True)
class Picture:
    """A pair's image (PNG bytes) and, where a plan can be drawn, heat a cell for its own caption and for the
    nominee."""

    image: bytes
    own_heat: list[float] | None
    best_heat: list[float] | None
    attack: str | None


@dataclass(frozen=True)
class ScanFiles:
    """What the page is made from.

    Attributes:
        summary, settings: summary.json and scan.json.
        scores: detector -> column of `rows`; those the encoder could not serve are left out.
        rows: ScanRows, likeliest lies first, at most 100,000.
        total: rows in the scan.
        histograms: column -> (edges, counts by action), over all rows.
        reasons: why pairs were not kept, and how many; a pair may have several.
        pictures: key -> picture, of the pairs in gallery.parquet.
    """

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    scores: Mapping[str, str]
    rows: pa.Table
    total: int
    histograms: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]
    reasons: Mapping[str, int]
    pictures: Mapping[str, Picture]


def load_scan(folder: Path) -> ScanFiles:
    """Read a finished scan.

    Raises:
        UserError: a file is missing or is not what docs/formats.md says; the message names it.
    """
    try:
        return _load(folder)
    except (KeyError, TypeError, AttributeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{folder}: not as a finished scan leaves it ({type(error).__name__}: {clean(error, 80)})"
        ) from None


def _load(folder: Path) -> ScanFiles:
    summary, settings = _json(folder / "summary.json"), _json(folder / "scan.json")
    table = _table(folder / "scan.parquet", NEEDED)
    given = {clean(name, 60): str(about["column"]) for name, about in summary["detectors"].items()}
    scores = {
        name: column for name, column in given.items() if column in table.column_names and not table[column].null_count
    }
    action = np.array(table["action"].to_pylist(), object)
    if stray := set(action) - set(ACTIONS):
        raise UserError(f"{folder / 'scan.parquet'}: action '{clean(min(stray), 40)}' is none of {', '.join(ACTIONS)}")
    lie = table["lie"].to_numpy(zero_copy_only=False)
    worst = np.argsort(-lie, kind="stable")[:MOST_ROWS]
    columns = ("lie", "p_value", *scores.values())
    alpha = float(settings["rule"]["alpha"])
    return ScanFiles(
        folder,
        summary,
        settings,
        scores,
        table.take(pa.array(worst)),
        table.num_rows,
        {name: histogram(table[name].to_numpy(zero_copy_only=False), action) for name in columns},
        _reasons(table, action != "keep", alpha),
        _pictures(folder / "gallery.parquet"),
    )


def histogram(values: np.ndarray, action: np.ndarray, bins: int = 48) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges `[bins + 1]` and counts `[bins]` by action; the last bin takes what lies above the 99.9th percentile."""
    low, high = float(values.min()), float(np.quantile(values, 0.999))
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    clipped = values.clip(edges[0], edges[-1])
    return edges, {name: np.histogram(clipped[action == name], edges)[0] for name in ACTIONS}


def _reasons(table: pa.Table, distrusted: np.ndarray, alpha: float) -> dict[str, int]:
    def column(name: str) -> np.ndarray | None:
        if name not in table.column_names or table[name].null_count:
            return None
        values: np.ndarray = table[name].to_numpy(zero_copy_only=False)
        return values

    copies = column("copies")
    if copies is None:
        raise ValueError("pairs without `copies`")
    named = ("neighbour_ot", "untrained_neighbour", "claim_left_out", "own_rank", "conflicting_captions")
    votes, looks, others, own, conflict = (column(f"{name}_score") for name in named)
    found = {
        "what it says is said unusually often, and a witness disputes it": table["disputed"].to_numpy(False),
        "the same claim is made by several copies of the image": copies > 1,
        "a word is used that most use without having seen it": table["doubtful_word"].is_valid().to_numpy(),
    }
    if votes is not None:
        found["images alike to the encoder carry other captions"] = votes / copies > alpha
    if looks is not None:
        found["images that look alike carry other captions"] = looks / copies > alpha
    if others is not None:
        found["what others say of their images leads to other captions"] = others > alpha
    if own is not None:
        found["the encoder finds other captions nearer"] = own > alpha
    if conflict is not None:
        found["the same image stands elsewhere under other words"] = conflict > 0.5
    counts = {name: int((mask & distrusted).sum()) for name, mask in found.items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is this the folder of a finished scan?") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object")
    return value


def _table(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is this the folder of a finished scan?") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({clean(error, 120)})") from None
    if missing := [name for name in columns if name not in table.column_names]:
        raise UserError(f"{path}: column '{missing[0]}' is missing")
    if not table.num_rows and "lie" in columns:
        raise UserError(f"{path}: holds no row")
    return table


def _pictures(path: Path) -> dict[str, Picture]:
    table = _table(path, ("key", "image", "own_heat", "best_heat", "attack"))
    return {
        row["key"]: Picture(row["image"] or b"", row["own_heat"], row["best_heat"], row["attack"])
        for row in table.to_pylist()
    }
