"""Synthetic run folders in the shape docs/formats.md gives: small noise images, two or three defences."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

RATES = {"clip": (0.96, 1.0), "otcclip": (0.001, 0.0), "roclip": (0.3, 0.5)}
TOP1 = {"clip": 0.471, "otcclip": 0.504, "roclip": 0.4}


def schema(text: str, binary: str, number: str) -> pa.Schema:
    kinds = [(text, pa.string()), (binary, pa.binary()), (number, pa.float32())]
    return pa.schema([(name, kind) for names, kind in kinds for name in names.split()])


GALLERY = schema("attack key true_name target clean_prediction prediction", "image clean_image", "confidence")
PAIRS = schema("key caption new_caption action attack true_name", "image", "suspicion")
POISON = schema("key attack original_caption", "", "")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def noise(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (size, size, 3), dtype=np.uint8)


def patched(pixels: np.ndarray, side: int = 6) -> np.ndarray:
    pixels = pixels.copy()
    pixels[-side:, -side:] = 255
    return pixels


def rate(asr: float, n: int) -> dict[str, float]:
    return {"asr": asr, "n": n, "low": max(0.0, asr - 0.01), "high": min(1.0, asr + 0.01)}


def result(defense: str, /, **changes: Any) -> dict[str, Any]:
    backdoor, targeted = RATES.get(defense, (0.2, 0.1))
    row = {
        "defense": defense,
        "seed": 0,
        "epochs": 6,
        "top1": TOP1.get(defense, 0.45),
        "top5": 0.78,
        "attacks": {"badnets": rate(backdoor, 1000), "targeted": rate(targeted, 16)},
        "clean_asr": None if defense == "clip" else {"badnets": 0.0, "targeted": 0.0},
        "seconds": 381.2,
        "pairs_kept": 900,
        "pairs_total": 1000,
        "poison_kept": {"badnets": 9, "targeted": 0},
        "poison_total": {"badnets": 90, "targeted": 240},
    }
    return row | changes


def history(row: dict[str, Any]) -> list[dict[str, Any]]:
    judges = row["defense"] != "clip"
    lines = []
    for epoch in range(row["epochs"]):
        line: dict[str, Any] = {"epoch": epoch, "phase": "warm-up" if judges and epoch < 2 else "train"}
        line |= {"loss": float("nan") if epoch == 1 else 1.0, "terms": {"clip": 1.0}, "seconds": 3.0 * epoch}
        if epoch != 3:  # not every epoch is evaluated
            line |= {"top1": row["top1"] * epoch / 6, "top5": 0.5, "attacks": row["attacks"]}
        if judges and epoch >= 2:
            line |= {"kept": 800 + epoch, "repaired": 50, "held_back": 60, "repair_precision": 0.7}
            line |= {"poison_kept": {"badnets": epoch, "targeted": 0}, "trust_auroc": {"badnets": 0.9}}
        lines.append(line)
    return lines


def gallery(defense: str, images: int) -> list[dict[str, Any]]:
    backdoor, targeted = RATES.get(defense, (0.2, 0.1))
    rows = []
    for i in range(images + 4):
        aimed = i >= images
        share = targeted if aimed else backdoor
        true, target = f"thing {i}", f"goal {i}" if aimed else "banana"
        pixels = noise(i)
        rows.append(
            {
                "attack": "targeted" if aimed else "badnets",
                "key": f"test-{i}",
                "image": png(pixels if aimed else patched(pixels)),
                "clean_image": png(pixels),
                "true_name": true,
                "target": target,
                "clean_prediction": true,
                "prediction": target if i % 10 < 10 * share - 0.1 else true if i % 2 else f"thing {i + 1}",
                "confidence": 0.61,
            }
        )
    return rows


def pairs() -> list[dict[str, Any]]:
    def row(i: int, action: str, attack: str = "", new: str | None = None) -> dict[str, Any]:
        pixels = noise(5 if attack == "targeted" else 1000 + i)
        return {
            "key": f"train-{i}",
            "image": png(patched(pixels) if attack == "badnets" else pixels),
            "caption": "banana | fruit" if attack else f"caption {i}",
            "new_caption": new,
            "action": action,
            "suspicion": i / 100,
            "attack": attack,
            "true_name": f"thing {i}",
        }

    rows = [row(i, "re-pair", "badnets", f"mended {i}") for i in range(5)]
    rows += [row(i, "hold-back", "targeted") for i in range(5, 9)]  # four copies of one image
    rows += [row(9, "keep", "badnets")]
    rows += [row(i, "re-pair", "", f"changed {i}") for i in range(10, 24)]
    return rows + [row(i, "hold-back") for i in range(24, 27)]


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


Edit = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(*defenses, name=…, images=…, rows=…, edit=…)`: `edit(kind, row)` changes rows in place."""

    def make(
        *defenses: str,
        name: str = "demo",
        images: int = 30,
        rows: list[dict[str, Any]] | None = None,
        edit: Edit = lambda kind, row: None,
        settings: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()

        def edited(kind: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for item in items:
                edit(kind, item)
            return items

        rows = rows if rows is not None else [result(d) for d in defenses or ("clip", "otcclip")]
        for row in rows:
            place = folder / row["defense"]
            place.mkdir(exist_ok=True)
            lines = edited("history", history(row))
            (place / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            write_parquet(place / "gallery.parquet", edited("gallery", gallery(row["defense"], images)), GALLERY)
            if row["defense"] != "clip":
                write_parquet(place / "pairs.parquet", edited("pairs", pairs()), PAIRS)
        poison = [{"key": f"train-{i}", "attack": "badnets", "original_caption": f"first words {i}"} for i in range(5)]
        write_parquet(folder / "poison.parquet", edited("poison", poison), POISON)
        (folder / "results.json").write_text(json.dumps(rows))
        default = {"corpus": "emoji", "hold_out": "twemoji", "seed": 0, "versions": {"torch": "2.14.1"}}
        (folder / "run.json").write_text(json.dumps(settings if settings is not None else default))
        return folder

    return make


@pytest.fixture
def a_result() -> Callable[..., dict[str, Any]]:
    return result


@pytest.fixture
def a_rate() -> Callable[[float, int], dict[str, float]]:
    return rate


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(seed, size, patch=side)`: a PNG of noise, with a white corner where `patch` is given."""

    def make(seed: int, size: int = 24, patch: int = 0) -> bytes:
        pixels = noise(seed, size)
        return png(patched(pixels, patch) if patch else pixels)

    return make
