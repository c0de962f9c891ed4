"""What came of a run, held against the ground truth that the defence never saw, and written for the report."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.atomic import atomic_file, write_json
from otcclip.data.png import png
from otcclip.defenses.base import ACTIONS, HOLD_BACK, KEEP, REPAIR, Decisions, TrainingPairs
from otcclip.evaluation.detection import detection
from otcclip.models import save_open_clip
from otcclip.training.judge import Judge
from otcclip.training.loop import Trainer
from otcclip.training.setting import RunSpec, Setting, start_of

SHOWN_PAIRS = 2000


def verdict(trainer: Trainer, pairs: TrainingPairs, setting: Setting) -> dict[str, Any]:
    """What the defence decided, held against the ground truth that it never saw."""
    decisions = trainer.defense.decisions(pairs)
    counts = np.bincount(decisions.action, minlength=3)
    out: dict[str, Any] = {
        "kept": int(counts[KEEP]),
        "repaired": int(counts[REPAIR]),
        "held_back": int(counts[HOLD_BACK]),
    }
    if not setting.records:
        return out
    attack_of = {record.key: record.attack for record in setting.records}
    planted = np.array([attack_of.get(key, "") for key in pairs.keys])
    names = dict.fromkeys(record.attack for record in setting.records)
    out["poison_kept"] = {a: int(((planted == a) & (decisions.action == KEEP)).sum()) for a in names}
    if not np.isnan(decisions.suspicion).any():
        honest = planted == ""
        out["trust_auroc"] = {
            a: detection(decisions.suspicion[honest | (planted == a)], (planted == a)[honest | (planted == a)]).auroc
            for a in names
        }
    precision = _repair_precision(decisions, pairs, setting)
    return out if precision is None else {**out, "repair_precision": precision}


def _repair_precision(decisions: Decisions, pairs: TrainingPairs, setting: Setting) -> float | None:
    """Share of re-paired images whose new caption is a caption of what they really show."""
    rows = np.nonzero(decisions.action == REPAIR)[0]
    if not len(rows) or not setting.train.labels:
        return None
    spoken = set(zip(setting.split.train.labels, setting.split.train.captions, strict=True))
    right = [(setting.train.labels[i], pairs.captions[decisions.caption_of[i]]) in spoken for i in rows]
    return float(np.mean(right))


def write_outcome(
    spec: RunSpec,
    trainer: Trainer,
    judge: Judge,
    setting: Setting,
    pairs: TrainingPairs,
    history: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Write the model, the pictures and, last of all, the result that marks the run as finished."""
    folder, model = spec.folder, trainer.model
    save_open_clip(model, folder)
    _write_rows(folder / "gallery.parquet", judge.gallery(model, spec.seed))
    _write_rows(folder / "pairs.parquet", _judged_pairs(spec, trainer, pairs, setting))
    last = history[-1]
    total: dict[str, int] = {}
    for record in setting.records:
        total[record.attack] = total.get(record.attack, 0) + 1
    result = {
        "defense": spec.name or spec.defense,
        "seed": spec.seed,
        "epochs": spec.epochs,
        "top1": last["top1"],
        "top5": last["top5"],
        "attacks": last["attacks"],
        "clean_asr": None,
        "seconds": round(trainer.seconds, 1),
        "pairs_kept": last["kept"],
        "pairs_repaired": last["repaired"],
        "poison_kept": last.get("poison_kept", {}),
        "pairs_total": len(pairs),
        "poison_total": total,
        "n": int(judge.unseen.sum()),
        "test_left_out": [key for key, unseen in zip(judge.test.keys, judge.unseen, strict=True) if not unseen],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "dataset": f"emoji/{setting.split.hold_out}",
        "model": spec.model,
        "pretrained": str(folder / "open_clip_model.safetensors"),
        "task": "zeroshot_classification",
        "metrics": {"acc1": last["top1"], "acc5": last["top5"]},
    }
    if (start := start_of(spec)) is not None:
        spent = json.loads((start.folder / "result.json").read_text())["seconds"]
        result["start"] = {"defense": start.name or start.defense, "seconds": spent}
    write_json(folder / "result.json", result)
    return result


def _judged_pairs(spec: RunSpec, trainer: Trainer, pairs: TrainingPairs, setting: Setting) -> list[dict[str, Any]]:
    """Every poison pair, and the honest pairs re-paired or held back (a seeded sample beyond SHOWN_PAIRS)."""
    decisions = trainer.defense.decisions(pairs)
    attack_of = {record.key: record.attack for record in setting.records}
    poison = [i for i, key in enumerate(pairs.keys) if key in attack_of]
    judged = [i for i in np.nonzero(decisions.action != KEEP)[0].tolist() if pairs.keys[i] not in attack_of]
    room = max(0, SHOWN_PAIRS - len(poison))
    if len(judged) > room:
        judged = sorted(np.random.default_rng(spec.seed).choice(judged, room, replace=False).tolist())
    rows = []
    for i in [*poison, *judged]:
        repaired = decisions.action[i] == REPAIR
        rows.append(
            {
                "key": pairs.keys[i],
                "image": png(setting.train.images[i]),
                "caption": setting.train.captions[i],
                "new_caption": pairs.captions[decisions.caption_of[i]] if repaired else None,
                "action": ACTIONS[decisions.action[i]],
                "suspicion": float(decisions.suspicion[i]),
                "attack": attack_of.get(pairs.keys[i], ""),
                "true_name": setting.train.labels[i],
            }
        )
    return rows


_COLUMNS = {
    "image": pa.binary(),
    "clean_image": pa.binary(),
    "confidence": pa.float64(),
    "suspicion": pa.float64(),
}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    schema = pa.schema([(name, _COLUMNS.get(name, pa.string())) for name in rows[0]])
    with atomic_file(path) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), handle)
