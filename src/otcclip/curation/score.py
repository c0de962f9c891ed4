"""The second pass: a unit's rows, every pair scored against the fixed reference.

The reference is the pairs whose keys hash lowest, at most `size` of them: the same pairs in every process, whatever
the order and the cut of the shards.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from otcclip.curation.decide import Rule
from otcclip.curation.encode import unit_features, unit_table
from otcclip.curation.units import Unit
from otcclip.data.atomic import atomic_file
from otcclip.data.keys import first_of_each, hash_keys
from otcclip.detectors import (
    Detector,
    PairFeatures,
    applies,
    claims,
    disputed,
    false_word,
    lie_probability,
    lies_by_caption,
    look_alikes,
    match,
    p_values,
    pool,
    untrained_vote,
)
from otcclip.errors import UserError
from otcclip.evidence.words import NONE
from otcclip.models import Features
from otcclip.transport import FeatureSets

BATCH = 4096


@dataclass(frozen=True)
class Census:
    """Every pair of the scan, as far as scoring must know all of them.

    Attributes:
        usable: unit name -> rows that are scored; a key seen in an earlier unit is not.
        chosen: unit name -> rows that are in the reference.
        pairs: usable pairs in all.
        mark: fingerprint of the reference and of the units there; rows scored beside others are scored again.
    """

    usable: Mapping[str, NDArray[np.int64]]
    chosen: Mapping[str, NDArray[np.int64]]
    pairs: int
    mark: str


def take_census(units: Sequence[Unit], folder: Path, size: int) -> Census:
    """Read the keys of all units; 8 bytes a pair are held."""
    hashes = [hash_keys(unit_table(unit, folder, ["key"])["key"].to_pylist()) for unit in units]
    joined = np.concatenate(hashes)
    first = first_of_each(joined)
    usable = np.flatnonzero(first)
    lowest = usable if len(usable) <= size else usable[np.argsort(_shuffled(joined)[usable], kind="stable")[:size]]
    in_reference = np.zeros(len(joined), bool)
    in_reference[lowest] = True
    starts = np.concatenate([[0], np.cumsum([len(part) for part in hashes])])
    spans = {unit.name: slice(a, b) for unit, a, b in zip(units, starts[:-1], starts[1:], strict=True)}
    mark = hashlib.blake2b(np.sort(joined[lowest]).tobytes(), digest_size=12)
    mark.update("\0".join(spans).encode())  # once a shard is back, of pairs with one key it may be another that counts
    return Census(
        {name: np.flatnonzero(first[span]) for name, span in spans.items()},
        {name: np.flatnonzero(in_reference[span]) for name, span in spans.items()},
        len(usable),
        mark.hexdigest(),
    )


def _shuffled(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`hashes [n]` in an order that follows from all of them together.

    The same for every job. Who writes some of the keys cannot choose which of them come first, as he could by their
    hashes alone, without knowing everybody else's.
    """
    salt = hashlib.blake2b(np.sort(hashes).tobytes(), digest_size=8).digest()
    mixed = hashes ^ np.frombuffer(salt, "<u8")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    shuffled: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return shuffled


def load_reference(units: Sequence[Unit], folder: Path, census: Census, encoder: tuple[bool, bool]) -> PairFeatures:
    """The reference's features.

    Raises:
        UserError: fewer than two pairs: there is nothing to compare with.
    """
    parts = [
        unit_features(unit, folder, encoder, census.chosen[unit.name])
        for unit in units
        if len(census.chosen[unit.name])
    ]
    if sum(map(len, parts)) < 2:
        raise UserError(f"scan: {sum(map(len, parts))} usable pairs; with fewer than two there is nothing to compare")

    def joined(name: str) -> Features:
        sides: list[Features] = [getattr(part, name) for part in parts]
        return Features(
            torch.cat([side.pooled for side in sides]), FeatureSets.concatenate([side.local for side in sides])
        )

    return PairFeatures(
        tuple(key for part in parts for key in part.keys),
        tuple(caption for part in parts for caption in part.captions),
        joined("image"),
        joined("text"),
        tuple(value for part in parts for value in part.sha256),
        np.concatenate([part.phash for part in parts]),
        torch.cat([part.pictures for part in parts if part.pictures is not None]),
        *encoder,
    )


def column(detector: Detector | type[Detector]) -> str:
    """The score's name in rows."""
    return f"{detector.name.replace('-', '_')}_score"


def row_schema(detectors: Sequence[Detector]) -> pa.Schema:
    """ScanRow (docs/formats.md). Scores that the encoder cannot give are null."""
    text, number = pa.large_string(), pa.float64()
    return pa.schema(
        [("key", text), ("sha256", pa.string()), ("phash", pa.uint64()), ("caption", text), ("unit", pa.string())]
        + [(column(detector), number) for detector in detectors]
        + [
            ("p_value", number),
            ("lie", number),
            ("copies", pa.int64()),
            ("disputed", pa.bool_()),
            ("doubtful_word", text),
            ("own_distance", number),
            ("own_rank", pa.int64()),
        ]
        + [("best_key", text), ("best_caption", text), ("best_distance", number)]
        + [("best_place", number), ("best_looks_place", number), ("best_lie", number)]
        + [("margin", number), ("action", pa.string()), ("new_caption", text), ("new_caption_key", text)]
    )


def score_unit(
    unit: Unit,
    folder: Path,
    reference: PairFeatures,
    rows: NDArray[np.int64],
    detectors: Sequence[Detector],
    rule: Rule,
    mark: str,
) -> None:
    """Write `rows/NAME.parquet`, whole or not at all, under `mark` (what else the scores depend on)."""
    begun = time.perf_counter()
    schema = row_schema(detectors)
    with atomic_file(rows_path(unit, folder)) as handle, pq.ParquetWriter(handle, schema) as writer:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            pairs = unit_features(unit, folder, (reference.joint, reference.local), part, reference)
            writer.write_table(_rows(pairs, unit.name, detectors, rule, schema))
        writer.add_key_value_metadata({"mark": mark, "seconds": str(time.perf_counter() - begun)})


def rows_path(unit: Unit, folder: Path) -> Path:
    return folder / "rows" / f"{unit.name}.parquet"


def scored(unit: Unit, folder: Path, mark: str) -> float | None:
    """Seconds that scoring the unit under `mark` took; None where that is not done."""
    try:
        metadata = pq.read_metadata(rows_path(unit, folder)).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return float(metadata[b"seconds"]) if metadata.get(b"mark") == mark.encode() else None


def _rows(pairs: PairFeatures, unit: str, detectors: Sequence[Detector], rule: Rule, schema: pa.Schema) -> pa.Table:
    n = len(pairs)
    columns: dict[str, object] = {
        "key": list(pairs.keys),
        "sha256": list(pairs.sha256),
        "phash": pairs.phash,
        "caption": list(pairs.captions),
        "unit": [unit] * n,
    }
    for detector in detectors:
        columns[column(detector)] = detector.score(pairs) if applies(detector, pairs) else [None] * n
    seen, captions = look_alikes(pairs), pool(pairs)
    ranked = match(pairs) if pairs.joint else None
    lie = lie_probability(pairs)
    against = pairs.against
    first = captions.first[seen.nominee].tolist()
    best_caption = [against.captions[i] for i in first]
    best_key = [against.keys[i] for i in first]
    margin = np.full(n, np.nan) if ranked is None else ranked.margin.double().numpy()
    best_lie = lies_by_caption(against)[seen.nominee.numpy()]
    # The look-alikes of a crowd that could say better are its own members: it has no nominee's place.
    place = seen.nominee_place.double().masked_fill(claims(pairs).crowded, np.nan).numpy()
    looks = untrained_vote(pairs).nominee_place.double().numpy()
    action = rule.decide(lie, best_lie, place, looks, margin)
    mended = action == "re-pair"
    columns |= {
        "p_value": p_values(pairs),
        "lie": lie,
        "copies": claims(pairs).made.numpy(),
        "disputed": disputed(pairs),
        "doubtful_word": [
            against.agreement.names[word] if word != NONE else None for word in false_word(pairs).tolist()
        ],
        "own_distance": [None] * n if ranked is None else ranked.own_distance.double().numpy(),
        "own_rank": [None] * n if ranked is None else _rank(ranked.own_share.numpy(), len(captions.first)),
        "best_key": best_key,
        "best_caption": best_caption,
        "best_distance": [None] * n if ranked is None else ranked.best_distance.double().numpy(),
        "best_place": place,
        "best_looks_place": looks,
        "best_lie": best_lie,
        "margin": [None] * n if ranked is None else margin,
        "action": action.tolist(),
        "new_caption": [c if m else None for c, m in zip(best_caption, mended, strict=True)],
        "new_caption_key": [k if m else None for k, m in zip(best_key, mended, strict=True)],
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


def _rank(share: NDArray[np.floating], captions: int) -> NDArray[np.int64]:
    """1 for the nearest caption of the pool."""
    rank: NDArray[np.int64] = np.rint(share * captions + 0.5).astype(np.int64)
    return rank
