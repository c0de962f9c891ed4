"""The first pass: a unit's features on disk, so that the second can compare any pair with any other.

A unit leaves two files in `features/`: `NAME.safetensors` (vectors in half precision and the images made small,
memory-mapped when read) and `NAME.parquet` (`SCHEMA`), written last: where it is, the unit is done. Bad pairs go to
`skipped/`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from otcclip.curation.encoders import ScanEncoder
from otcclip.curation.phash import phash
from otcclip.curation.units import Unit
from otcclip.data.atomic import atomic_file
from otcclip.data.decode import BadPair, Limits, decode_image
from otcclip.data.shards import Skipped
from otcclip.data.store import write_skipped
from otcclip.detectors import PairFeatures
from otcclip.errors import UserError
from otcclip.models import Features
from otcclip.transport import FeatureSets

BATCH = 256
PICTURE = 64  # side of the small pictures that are kept for witnesses who look at pixels: 12 KB a pair
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("caption", pa.large_string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("label", pa.string()),  # for evaluation only; no detector sees it
        ("offset", pa.int64()),  # where the image lies (`units.Item.at`), for those who want to see it again
        ("size", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Encoded:
    """What encoding a unit took: pairs, pairs skipped, seconds in all and seconds inside the encoder."""

    unit: str
    pairs: int
    skipped: int
    seconds: float
    encoder_seconds: float


def encode_unit(unit: Unit, encoder: ScanEncoder, folder: Path, limits: Limits) -> Encoded:
    """Read, decode, hash and encode a unit.

    Raises:
        UserError: the shard is missing or damaged, or the disk is full; the unit then leaves no mark of being done.
    """
    begun = time.perf_counter()
    skipped: list[Skipped] = []
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    parts: list[_Part] = []
    inside = 0.0
    for batch in _batches(unit, encoder.image_size, limits, skipped):
        columns["key"] += batch.keys
        columns["caption"] += batch.captions
        columns["sha256"] += batch.sha256
        images, pictures = batch.tensor(), batch.pictures()
        columns["phash"] += phash(pictures).tolist()
        columns["label"] += batch.labels
        columns["offset"] += [offset for offset, _ in batch.at]
        columns["size"] += [size for _, size in batch.at]
        start = time.perf_counter()
        image = encoder.images(images)
        inside += time.perf_counter() - start
        parts.append(_Part(image.pooled.half(), image.local.to(torch.float16), pictures))
    captions = sorted({str(caption) for caption in columns["caption"]})
    start = time.perf_counter()
    text = encoder.captions(captions) if captions else None
    inside += time.perf_counter() - start
    write_skipped(folder / "skipped" / f"{unit.name}.parquet", skipped)
    tensors = _tensors(parts, text, captions, [str(caption) for caption in columns["caption"]])
    with atomic_file(folder / "features" / f"{unit.name}.safetensors") as handle:
        handle.write(save(tensors))
    done = Encoded(unit.name, len(columns["key"]), len(skipped), time.perf_counter() - begun, inside)
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata({"encoded": json.dumps(asdict(done))})
    with atomic_file(folder / "features" / f"{unit.name}.parquet") as handle:
        pq.write_table(table, handle)
    return done


def encoded(unit: Unit, folder: Path) -> Encoded:
    """What `encode_unit` said of a unit that is done."""
    path = folder / "features" / f"{unit.name}.parquet"
    try:
        return Encoded(**json.loads(pq.read_schema(path).metadata[b"encoded"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    why = str(error).splitlines()[:1] or [type(error).__name__]
    return UserError(f"{path}: damaged ({why[0][:120]}); delete features/{path.stem}.* and scan again with --resume")


@dataclass(frozen=True)
class _Batch:
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    at: list[tuple[int, int]] = field(default_factory=list)
    images: list[NDArray[np.uint8]] = field(default_factory=list)

    def tensor(self) -> Tensor:
        return torch.from_numpy(np.stack(self.images)).permute(0, 3, 1, 2)

    def pictures(self) -> Tensor:
        """The images made small: `[n, 3, PICTURE, PICTURE]` uint8."""
        # By Pillow: the same numbers on every CPU, and a third of the time of torch's antialiasing in float.
        size = (PICTURE, PICTURE)
        small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in self.images]
        return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def _batches(unit: Unit, size: int, limits: Limits, skipped: list[Skipped]) -> Iterator[_Batch]:
    seen: set[str] = set()
    batch = _Batch()
    for item in unit.pairs(skipped.append, limits):
        pair = item.pair
        try:
            if pair.key in seen:
                raise BadPair("duplicate key")
            batch.images.append(decode_image(pair.image, size, limits, item.box))
        except BadPair as bad:
            skipped.append(Skipped(pair.key, unit.source, bad.reason))
            continue
        seen.add(pair.key)
        batch.keys.append(pair.key)
        batch.captions.append(pair.caption)
        batch.sha256.append(hashlib.sha256(pair.image).hexdigest())
        batch.labels.append(pair.label)
        batch.at.append(item.at)
        if len(batch.keys) == BATCH:
            yield batch
            batch = _Batch()
    if batch.keys:
        yield batch


@dataclass(frozen=True)
class _Part:
    pooled: Tensor
    local: FeatureSets
    pictures: Tensor


def _tensors(parts: list[_Part], text: Features | None, captions: list[str], carried: list[str]) -> dict[str, Tensor]:
    """As they are written; a text vector once for each distinct caption, `caption_of [n]` saying whose it is."""
    if not parts or text is None:
        return {"caption_of": torch.zeros(0, dtype=torch.int64)}
    place = {caption: i for i, caption in enumerate(captions)}
    local = FeatureSets.concatenate([part.local for part in parts])
    return {
        "image": torch.cat([part.pooled for part in parts]),
        "pictures": torch.cat([part.pictures for part in parts]),
        "image_local": local.values,
        "image_offsets": local.offsets,
        "text": text.pooled.half(),
        "text_local": text.local.values.half(),
        "text_offsets": text.local.offsets,
        "caption_of": torch.tensor([place[caption] for caption in carried]),
    }


def is_encoded(unit: Unit, folder: Path) -> bool:
    return (folder / "features" / f"{unit.name}.parquet").is_file()


def unit_table(unit: Unit, folder: Path, columns: list[str] | None = None) -> pa.Table:
    """A unit's keys, captions, hashes, and where its images lie.

    Raises:
        UserError: missing, damaged, or written by another version.
    """
    path = folder / "features" / f"{unit.name}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            written, table = file.schema_arrow.names, file.read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    if written != SCHEMA.names:
        raise UserError(f"{path}: written by another version of otcclip; name another --out")
    return table


def unit_features(
    unit: Unit,
    folder: Path,
    encoder: tuple[bool, bool],
    rows: np.ndarray | None = None,
    reference: PairFeatures | None = None,
) -> PairFeatures:
    """A unit's pairs (those at `rows`) as detectors see them.

    Args:
        encoder: whether the encoder is joint, and local.

    Raises:
        UserError: missing or damaged.
    """
    table = unit_table(unit, folder)
    index = torch.arange(table.num_rows) if rows is None else torch.from_numpy(rows)
    if not len(index):
        raise ValueError(f"unit {unit.name}: no row asked for")
    path = folder / "features" / f"{unit.name}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _damaged(path, error) from None
    caption = held["caption_of"][index]
    image = FeatureSets(held["image_local"], held["image_offsets"]).take(index)
    text = FeatureSets(held["text_local"], held["text_offsets"]).take(caption)
    table = table.take(pa.array(index.numpy()))
    return PairFeatures(
        tuple(table["key"].to_pylist()),
        tuple(table["caption"].to_pylist()),
        Features(held["image"][index].float(), image),
        Features(held["text"][caption].float(), text),
        tuple(table["sha256"].to_pylist()),
        table["phash"].to_numpy().astype(np.uint64),
        held["pictures"][index],
        *encoder,
        reference,
    )
