"""`gallery.parquet`: the pairs a person should look at first, with their images and what carries the transport plan.

For an encoder with comparable patches and tokens, each cell of the image gets what the plan between the patches and a
caption's
tokens says of it: p * sum_t P_jt (V_j . T_t), the mean similarity to the tokens that the cell's mass is carried to.
High where the cell explains the caption. Once for the caption it came with, once for the nominee.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from otcclip.attacks.records import read_records
from otcclip.curation.encode import unit_features, unit_table
from otcclip.curation.units import Unit
from otcclip.data.atomic import atomic_file
from otcclip.data.decode import BadPair, Box, Limits, decode_image
from otcclip.data.png import png
from otcclip.detectors import PairFeatures
from otcclip.detectors.views import grid_side
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
    units: Sequence[Unit],
    folder: Path,
    columns: Sequence[str],
    reference: PairFeatures | None,
    poison: Path | None,
    limits: Limits,
) -> None:
    """Choose the pairs, read their images again, and write the file; `reference` where plans can be drawn.

    Raises:
        UserError: an image is not what it was when it was scanned, or a full disk.
    """
    attack = {} if poison is None else {record.key: record.attack for record in read_records(poison)}
    chosen = _choose(folder, columns)
    with atomic_file(folder / "gallery.parquet") as handle, pq.ParquetWriter(handle, SCHEMA) as writer:
        for unit in units:
            wanted = chosen.get(unit.name)
            if not wanted:
                continue
            heats = {} if reference is None else _heats(unit, folder, wanted, reference)
            rows: list[dict[str, Any]] = []
            for key, data, box in _images(unit, folder, wanted, limits):
                own, best = heats.get(key, (None, None))
                try:
                    image = decode_image(data, SHOWN, limits, box)
                except BadPair:  # a sliver that the encoder's size was small enough for: it is listed without a picture
                    continue
                values = (key, png(image), own, best, attack.get(key))
                rows.append(dict(zip(SCHEMA.names, values, strict=True)))
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _images(
    unit: Unit, folder: Path, wanted: Mapping[str, str], limits: Limits
) -> Iterator[tuple[str, bytes, Box | None]]:
    """Key, encoded image and region of those wanted, in the unit's order."""
    table = unit_table(unit, folder, ["key", "sha256", "offset", "size"]).to_pydict()
    rows = [i for i, key in enumerate(table["key"]) if key in wanted]
    places = [(table["offset"][i], table["size"][i]) for i in rows]
    for i, (data, box) in zip(rows, unit.images(places, [table["sha256"][i] for i in rows], limits), strict=True):
        yield table["key"][i], data, box


def _choose(folder: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Unit -> key -> nominee of the worst pairs by each score, and of the likeliest lies of each action.

    Of pairs that show one image under one caption only the first is taken: fifteen copies tell no more than one.
    """
    names = ["key", "unit", "action", "best_caption", "sha256", "caption", "lie", *columns]
    table = pq.read_table(folder / "scan.parquet", columns=names)
    claims = list(zip(table["sha256"].to_pylist(), table["caption"].to_pylist(), strict=True))
    action = np.array(table["action"].to_pylist(), object)
    taken: set[tuple[str, str]] = set()
    take: list[int] = []

    def add(order: NDArray[np.int64], most: int) -> None:
        for row in order.tolist():
            if most == 0 or len(take) == MOST:
                return
            if claims[row] not in taken:
                taken.add(claims[row])
                take.append(row)
                most -= 1

    lie = table["lie"].to_numpy()
    for name in ("re-pair", "drop"):
        rows = np.flatnonzero(action == name)
        add(rows[np.argsort(-lie[rows], kind="stable")], PER_ACTION)
    for name in columns:
        score = table[name].to_numpy(zero_copy_only=False).astype(float)
        if not np.isnan(score).any() and np.ptp(score) > 0:
            add(np.argsort(-score, kind="stable"), PER_DETECTOR)
    out: dict[str, dict[str, str]] = {}
    for row in table.select(["key", "unit", "best_caption"]).take(pa.array(take, pa.int64())).to_pylist():
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
    image = pairs.image.local.to(torch.float32)
    own = _explained(image, pairs.text.local.to(torch.float32))
    best = _explained(image, reference.text.local.take(nominees).to(torch.float32))
    return {key: (own[i], best[i]) for i, key in enumerate(pairs.keys)}


def _explained(image: FeatureSets, text: FeatureSets) -> list[list[float]]:
    plans = plan(image, text, epsilon=EPSILON, iterations=ITERATIONS, validate=False)
    return [(len(p) * (p * (image[i] @ text[i].T)).sum(dim=1)).tolist() for i, p in enumerate(plans)]
