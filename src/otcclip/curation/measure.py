"""How well a scan found poison that is known: for evaluation only, after every score and action is on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from otcclip.attacks.records import read_records
from otcclip.curation.encode import unit_table
from otcclip.curation.units import Unit
from otcclip.data.decode import printable
from otcclip.errors import UserError
from otcclip.evaluation import Rate, detection


def measure(folder: Path, units: Sequence[Unit], columns: Sequence[str], poison: Path) -> dict[str, Any]:
    """Detection of each attack by each score and by p_value, what was done with its pairs, and whether re-paired
    captions name what the image shows (where pairs have labels).

    Raises:
        UserError: the poison file cannot be read, or names no pair of this scan.
    """
    attack = {record.key: record.attack for record in read_records(poison)}
    names = ["key", "action", "new_caption_key", "p_value", "lie", *columns]
    rows = pq.read_table(folder / "scan.parquet", columns=names)
    keys = rows["key"].to_pylist()
    of = np.array([attack.get(key, "") for key in keys], object)
    present = sorted({name for name in of if name})
    if not present:
        raise UserError(f"{poison}: names no pair of this scan (first key: {printable(next(iter(attack), 'none'))!r})")
    if "" not in of:
        raise UserError(f"{poison}: names every pair of this scan; detection takes honest pairs too")
    found: dict[str, dict[str, Any]] = {}
    for name in ("p_value", *columns):
        scores = rows[name].to_numpy(zero_copy_only=False).astype(float)
        if np.isnan(scores).any():
            continue  # the encoder cannot serve this detector
        found[name] = {}
        for one in present:
            asked = (of == "") | (of == one)
            found[name][one] = asdict(detection(scores[asked], of[asked] == one))
    action = np.array(rows["action"].to_pylist(), object)
    what = {one: {a: int(((of == one) & (action == a)).sum()) for a in ("keep", "re-pair", "drop")} for one in present}
    honest = {a: int(((of == "") & (action == a)).sum()) for a in ("keep", "re-pair", "drop")}
    out: dict[str, Any] = {"detection": found, "actions": what, "honest": honest}
    label = _labels(folder, units)
    if label:
        new = rows["new_caption_key"].to_pylist()
        right = {key: label[other] == label[key] for key, other in zip(keys, new, strict=True) if other is not None}
        out["repair"] = {
            one: asdict(Rate.of(sum(right[k] for k in chosen), len(chosen)))
            for one in (*present, "")
            if (chosen := [k for k, a in zip(keys, of, strict=True) if a == one and k in right])
        }
    return out


def _labels(folder: Path, units: Sequence[Unit]) -> dict[str, str]:
    """Key -> true class, or nothing where any pair has none."""
    labels: dict[str, str] = {}
    for unit in units:
        table = unit_table(unit, folder, ["key", "label"])
        if table["label"].null_count:
            return {}
        labels |= dict(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    return labels
