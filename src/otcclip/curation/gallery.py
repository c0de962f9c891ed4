"""`gallery.parquet`: the pairs a person should look at first, with their images and what carries the transport plan.

For an encoder with comparable patches and tokens, each cell of the image gets what the plan between the patches and a
caption's
tokens says of it: p * sum_t P_jt (V_j . T_t), the mean similarity to the tokens that the cell's mass is carried to.
High where the cell explains the caption. Once for the caption it came with, once for the nominee.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from otcclip.attacks.records import read_records
from otcclip.curation.encode import unit_features, unit_table
from otcclip.curation.units import Unit
from otcclip.data.atomic import atomic_file
from otcclip.data.decode import DEFAULT_LIMITS, BadPair, decode_image
from otcclip.detectors import PairFeatures
from otcclip.detectors.look_alikes import grid_side
from otcclip.evidence.matching import EPSILON, ITERATIONS
from otcclip.transport import FeatureSets, plan

SHOWN = 96
PER_DETECTOR, PER_ACTION, MOST = 40, 160, 720
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("image", pa.binary()),
        ("own_heat", pa.list_(pa.float32())),
        ("best_heat", pa.list_(pa.float32())),
        ("attack", pa.string()),
    ]
)


def write_gallery(
    units: Sequence[Unit], folder: Path, columns: Sequence[str], reference: PairFeatures | None, poison: Path | None
) -> None:
    """Choose the pairs, read their images again, and write the file; `reference` where plans can be drawn."""
    attack = {} if poison is None else {record.key: record.attack for record in read_records(poison)}
    chosen = _choose(folder, columns)
    with atomic_file(folder / "gallery.parquet") as handle, pq.ParquetWriter(handle, SCHEMA) as writer:
        for unit in units:
            wanted = chosen.get(unit.name)
            if not wanted:
                continue
            heats = {} if reference is None else _heats(unit, folder, wanted, reference)
            rows: list[dict[str, Any]] = []
            for item in unit.pairs(lambda skipped: None, DEFAULT_LIMITS):
                key = item.pair.key
                if key not in wanted:
                    continue
                try:
                    image = decode_image(item.pair.image, SHOWN, DEFAULT_LIMITS, item.box)
                except BadPair:
                    continue
                own, best = heats.get(key, (None, None))
                values = (key, _png(image), own, best, attack.get(key))
                rows.append(dict(zip(SCHEMA.names, values, strict=True)))
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _choose(folder: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Unit -> key -> nominee of the worst pairs by each score, and of the worst of each action by p_value."""
    table = pq.read_table(
        folder / "scan.parquet", columns=["key", "unit", "action", "best_caption", "p_value", *columns]
    )
    take: dict[int, None] = {}
    action = np.array(table["action"].to_pylist(), object)
    p = table["p_value"].to_numpy()
    for name in ("re-pair", "drop"):
        rows = np.flatnonzero(action == name)
        take |= dict.fromkeys(rows[np.argsort(-p[rows], kind="stable")[:PER_ACTION]].tolist())
    for name in columns:
        score = table[name].to_numpy(zero_copy_only=False).astype(float)
        if not np.isnan(score).any() and np.ptp(score) > 0:
            take |= dict.fromkeys(np.argsort(-score, kind="stable")[:PER_DETECTOR].tolist())
    out: dict[str, dict[str, str]] = {}
    for row in table.select(["key", "unit", "best_caption"]).take(pa.array(list(take)[:MOST])).to_pylist():
        out.setdefault(row["unit"], {})[row["key"]] = row["best_caption"]
    return out


def _heats(
    unit: Unit, folder: Path, wanted: dict[str, str], reference: PairFeatures
) -> dict[str, tuple[list[float], list[float]]]:
    """Key -> heat of the own caption and of the nominee, cell by cell, row by row."""
    keys = unit_table(unit, folder, ["key"])["key"].to_pylist()
    rows = np.array([i for i, key in enumerate(keys) if key in wanted], np.int64)
    pairs = unit_features(unit, folder, (True, True), rows)
    if not grid_side(pairs.image.local):
        return {}
    # A nominee is a caption of the reference: the first pair there that carries it has its tokens.
    first: dict[str, int] = {}
    for i, caption in enumerate(reference.captions):
        first.setdefault(caption, i)
    nominees = torch.tensor([first[wanted[key]] for key in pairs.keys])
    own = _explained(pairs.image.local, pairs.text.local)
    best = _explained(pairs.image.local, reference.text.local.take(nominees))
    return {key: (own[i], best[i]) for i, key in enumerate(pairs.keys)}


def _explained(image: FeatureSets, text: FeatureSets) -> list[list[float]]:
    plans = plan(image, text, epsilon=EPSILON, iterations=ITERATIONS, validate=False)
    return [(len(p) * (p * (image[i] @ text[i].T)).sum(dim=1)).tolist() for i, p in enumerate(plans)]


def _png(image: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()
