"""Shards to a `PairStore`: decode, count what is bad by reason, list it, stop when it is too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.atomic import atomic_file
from otcclip.data.decode import DEFAULT_LIMITS, BadPair, Limits, decode_image, printable
from otcclip.data.pairs import Pair, PairStore
from otcclip.data.shards import Skipped, count_reasons, expand_shards, read_shard
from otcclip.errors import UserError
from otcclip.progress import track


def load_store(
    shards: str | Path | Sequence[str | Path],
    image_size: int,
    max_bad: float = 0.05,
    skipped_path: Path | str | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> PairStore:
    """Every usable pair of `shards`, decoded to `[n, image_size, image_size, 3]`.

    Args:
        shards: brace pattern, folder, path, URL, or a list of these.
        image_size: side of the model's input, in pixels.
        max_bad: the share of bad pairs, 0 to 1, past which the run stops.
        skipped_path: where to list the bad pairs (`key, shard, reason`), Parquet; written even when empty.
        limits: caps on what a pair may ask of us.

    Labels are kept when every usable pair has one; sources are the json member's `source`, else the shard's
    name.

    Raises:
        UserError: a shard is missing or damaged, too many pairs are bad, none is usable, or the disk is full.
    """
    if image_size < 1 or not 0 <= max_bad <= 1:
        raise UserError(f"image size {image_size} must be positive and max_bad {max_bad} between 0 and 1")
    skipped: list[Skipped] = []
    pairs: list[Pair] = []
    images: list[np.ndarray] = []
    sources: list[str] = []
    seen: set[str] = set()
    for shard in track(expand_shards(shards), "reading shards"):
        for pair in read_shard(shard, limits=limits, on_skip=skipped.append):
            try:
                if pair.key in seen:
                    raise BadPair("duplicate key")
                images.append(decode_image(pair.image, image_size, limits))
            except BadPair as bad:
                skipped.append(Skipped(pair.key, shard, bad.reason))
                continue
            seen.add(pair.key)
            pairs.append(Pair(pair.key, b"", pair.caption, pair.label))  # the encoded bytes can go
            sources.append(pair.metadata.get("source") or Path(shard).stem)
    if skipped_path is not None:
        write_skipped(skipped_path, skipped)
    check_bad(skipped, len(pairs) + len(skipped), max_bad)
    labels = tuple(pair.label for pair in pairs if pair.label is not None)
    return PairStore(
        tuple(pair.key for pair in pairs),
        np.stack(images),
        tuple(pair.caption for pair in pairs),
        labels if len(labels) == len(pairs) else (),
        tuple(sources),
    )


def check_bad(skipped: Sequence[Skipped], total: int, max_bad: float) -> None:
    """Stop when more than `max_bad` of `total` pairs were skipped, or all of them.

    Raises:
        UserError: one line with the counts by reason and the first bad key.
    """
    if total == 0:
        raise UserError("the shards hold no pair")
    if len(skipped) > max_bad * total or len(skipped) == total:
        raise UserError(
            f"{len(skipped)} of {total} pairs are bad, more than the {max_bad:.1%} allowed (--max-bad): "
            f"{count_reasons(skipped)}; "
            f"the first is {printable(skipped[0].key)!r} in {printable(skipped[0].shard)}"
        )


def write_skipped(path: Path | str, skipped: Sequence[Skipped]) -> None:
    """List skipped pairs as Parquet with columns `key, shard, reason`. Raises UserError on a full disk."""
    # A file's name may hold bytes that are not UTF-8 (lone surrogates here), which Parquet's text may not.
    columns = {
        name: [getattr(record, name).encode("utf-8", "backslashreplace").decode() for record in skipped]
        for name in ("key", "shard", "reason")
    }
    table = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
    with atomic_file(path) as handle:
        pq.write_table(table, handle)
