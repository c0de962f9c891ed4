"""A matrix's folder made up for the report's tests: three groups, five defences, three seeds, figures that differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from otcclip.report.words import wilson

GROUPS = {"plain": ["badnets", "sig", "blended", "targeted"], "tiled:count=90": ["tiled:count=90"]}
DEFENSES = ("clip", "roclip", "safeclip", "otcclip-paper", "otcclip")
# Mean ASR by defence and attack; blended is no test, safeclip learns little.
ASR: Mapping[str, Mapping[str, float]] = {
    "clip": {"badnets": 0.94, "sig": 0.98, "blended": 0.61, "targeted": 1.0, "tiled": 0.9},
    "roclip": {"badnets": 0.97, "sig": 0.99, "blended": 0.5, "targeted": 0.94, "tiled": 0.93},
    "safeclip": {"badnets": 0.12, "sig": 0.2, "blended": 0.0, "targeted": 0.0, "tiled": 0.01},
    "otcclip-paper": {"badnets": 0.81, "sig": 0.7, "blended": 0.3, "targeted": 0.6, "tiled": 0.77},
    "otcclip": {"badnets": 0.003, "sig": 0.06, "blended": 0.01, "targeted": 0.0, "tiled": 0.22},
}
TOP1 = {"clip": 0.34, "roclip": 0.26, "safeclip": 0.09, "otcclip-paper": 0.25, "otcclip": 0.37}
SECONDS = {"clip": 300, "roclip": 380, "safeclip": 450, "otcclip-paper": 640, "otcclip": 430}
SHIFT = {0: -0.02, 1: 0.0, 2: 0.02}


def rate(value: float, n: int, key: str = "asr") -> dict[str, Any]:
    value = min(1.0, max(0.0, value))
    low, high = wilson(value, n)
    return {key: value, "n": n, "low": min(low, value), "high": max(high, value)}


def cell(group: str, defense: str, seed: int, attacks: Sequence[str]) -> dict[str, Any]:
    shift, top1 = SHIFT[seed], TOP1[defense]
    names = [text.partition(":")[0] for text in attacks]
    rates = {a: rate(ASR[defense][a] + shift, 16 if a == "targeted" else 1419) for a in names}
    targets = {"badnets": "banana", "sig": "guitar", "blended": "fire engine", "targeted": None, "tiled": "banana"}
    low, high = wilson(top1, 1420)
    figures = ("text_at_1", "text_at_5", "image_at_1", "image_at_5")
    return {
        "dataset": "emoji/twemoji",
        "model": "otcclip-tiny",
        "pretrained": "open_clip_model.safetensors",
        "task": "zeroshot_classification",
        "metrics": {"acc1": top1 + shift / 4, "acc5": top1 + 0.29},
        "intervals": {"acc1": [low, high], "acc5": [low + 0.29, high + 0.29]},
        "n": 1420,
        "attack": group,
        "planted": list(attacks),
        "poison_rate": None,
        "defense": defense,
        "seed": seed,
        "epochs": 16,
        "attacks": {a: {**r, "target": targets[a]} for a, r in rates.items()},
        "seconds": SECONDS[defense] + 5 * seed,
        "peak_memory_mib": 2000 + SECONDS[defense],
        "pairs_kept": 9000 if defense in ("clip", "roclip") else 7200,
        "pairs_repaired": 0,
        "pairs_total": 9214,
        "poison_kept": dict.fromkeys(names, 90 if defense in ("clip", "roclip") else 4),
        "poison_total": dict.fromkeys(names, 90),
        "utility": {
            "probe": {"probe": rate(top1 + 0.2, 703, "value")},
            "retrieval": {name: rate(top1 + 0.05 * i, 1420, "value") for i, name in enumerate(figures)},
        },
    }


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def make_matrix(
    folder: Path,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    defenses: Sequence[str] = DEFENSES,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    reference: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda cell: cell,
    **settings: Any,
) -> Path:
    """Write `bench.json`, the cells and, with `reference`, the run that was never poisoned; `change` edits a cell."""
    shared = {"dataset": "emoji/twemoji", "left_out": [], "target": "banana", "epochs": 16, "model": "otcclip-tiny"}
    shared |= {"image_size": 64, "batch_size": 128, "lr": 0.0015, "train_pairs": 8974, "test_images": 1420}
    rows = {**groups, **({"none": []} if reference else {})}
    bench = {
        **shared,
        "otcclip": "0.2.0",
        "versions": {"torch": "2.14.1"},
        "groups": {name: list(planted) for name, planted in rows.items()},
        "defenses": list(defenses),
        "seeds": list(seeds),
        "failures": {},
        "calls": [{"started": "2026-11-24T20:00:00+00:00", "processes": 2, "trained": 45, "seconds": 9000.0}],
        "wall_seconds": 9000.0,
        **settings,
    }
    write(folder / "bench.json", bench)
    for group, planted in rows.items():
        for defense in defenses if planted else ["clip"]:
            for seed in seeds:
                made = change(cell(group, defense, seed, planted))
                if made is None:
                    continue
                own = folder / group.replace(":", "_") / f"seed-{seed}" / defense
                write(own / "cell.json", made)
                if reference and planted and defense == "clip":
                    names = [text.partition(":")[0] for text in planted]
                    write(own / "never_poisoned.json", {"attacks": {a: rate(0.0, 1419) for a in names}})
    return folder


@pytest.fixture(scope="session", name="make_matrix")
def _make_matrix() -> Callable[..., Path]:
    return make_matrix
