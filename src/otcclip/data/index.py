"""From a source to pairs that can be trained on: read once, decode once, list what is bad, keep the result.

    data = open_pairs("shards/{00000..00041}.tar", "webdataset", image_size=224, cache="logs/.pairs", workers=8)
    data.table.captions, data.images[torch.arange(8)]

Every image is decoded before the first step. It costs one epoch's decoding and buys three things: bad pairs are
counted and listed before anything is trained on the rest, no step ever meets an image that fails, and a corpus that
fits is kept decoded. The result lies in a folder of its own under `cache`, named after all that it depends on, and is
used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otcclip.data.atomic import atomic_folder, disk_errors, write_json
from otcclip.data.decode import printable
from otcclip.data.images import Chosen, DecodedOnDemand, ImageSource
from otcclip.data.keys import first_of_each, hash_keys
from otcclip.data.manifest import Manifest
from otcclip.data.readers import ReadOptions, Spool, find_reader
from otcclip.data.shards import Skipped, expand_shards
from otcclip.data.store import check_bad, write_skipped
from otcclip.data.table import PairTable, Row, TableBuilder
from otcclip.errors import UserError
from otcclip.progress import track

FORMAT = 2  # 1: file names joined by newlines
VERIFY_BATCH = 64
TABLE, SKIPPED, DECODED, SPOOLED, CARD = "pairs.arrow", "skipped.parquet", "images.u8", "images.bin", "card.json"


@dataclass(frozen=True)
class PairData:
    """Pairs ready for training.

    Attributes:
        table: the usable pairs, in the source's order until `in_key_order`.
        images: `[n, 3, size, size]` uint8: a memory-mapped tensor, or a source that decodes on demand.
        folder: where the index lies, `skipped.parquet` among it.
        skipped: number of bad pairs.
    """

    table: PairTable
    images: Tensor | ImageSource
    folder: Path
    skipped: int

    def __len__(self) -> int:
        return len(self.table)

    def under(self, manifest: Manifest) -> PairData:
        """These pairs as a manifest has them: some dropped, some under other captions; nothing is copied.

        Raises:
            UserError: a pair that the manifest does not know, or none that it keeps.
        """
        table = self.table
        said = [manifest.caption(key, caption) for key, caption in zip(table.keys, table.captions, strict=True)]
        rows = np.array([i for i, caption in enumerate(said) if caption is not None], np.int64)
        if not len(rows):
            raise UserError(f"{manifest.path}: drops every pair")
        kept = table.take(rows).with_captions([caption for caption in said if caption is not None])
        return replace(self, table=kept, images=Chosen(self.images, torch.from_numpy(rows)))

    def in_key_order(self) -> PairData:
        """These pairs sorted by the numbers of their keys; nothing is copied but the table.

        What is learned of row i is then learned of a key: a run and its checkpoints do not depend on how the pairs are
        sharded or in which order they lie.
        """
        order = np.argsort(hash_keys(self.table.keys))
        return replace(self, table=self.table.take(order), images=Chosen(self.images, torch.from_numpy(order)))


def open_pairs(
    source: str,
    dataset_type: str,
    image_size: int,
    cache: Path | str,
    *,
    options: ReadOptions | None = None,
    max_bad: float = 0.05,
    workers: int = 0,
    decoded_gib: float = 8.0,
    limit: int | None = None,
) -> PairData:
    """Index `source`, or open the index made before of the same files with the same options.

    Args:
        source: as the format's reader takes it. dataset_type: a key of `READERS`, or `auto`.
        cache: folder that indexes are kept in.
        max_bad: the share of bad pairs, 0 to 1, past which this stops.
        workers: processes that decode.
        decoded_gib: a corpus that takes no more than this decoded is kept decoded, as a memory-mapped file.
        limit: take the first so many pairs alone.

    Raises:
        UserError: nothing there, damaged, too many bad pairs, or a full disk; no half-made index stays.
    """
    if image_size < 1 or not 0 <= max_bad <= 1:
        raise UserError(f"image size {image_size} must be positive and --max-bad {max_bad} between 0 and 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    name, _ = find_reader(dataset_type, source)
    items = expand_shards(source.split("::")) if name == "webdataset" else [source]
    options = options or ReadOptions()
    depends = {
        "format": FORMAT,
        "source": [source, name],
        "files": fingerprint(items),
        "options": asdict(options),
        "image_size": image_size,
        "limit": limit,
    }
    identity = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache) / identity
    if not (folder / CARD).is_file():
        _build(folder, source, name, image_size, options, max_bad, workers, decoded_gib, limit)
    return _open(folder, image_size, max_bad, workers, options)


def fingerprint(items: Sequence[str]) -> list[list[str | int]]:
    """Path, size in bytes and time (ns) of every file of a source: of a folder, its own files; addresses alone.

    Raises:
        UserError: missing, or not to be looked at.
    """
    out: list[list[str | int]] = []
    for item in items:
        if "://" in item:
            out.append([item, 0, 0])
            continue
        path = Path(item)
        try:
            files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
            out.extend([str(file), (seen := file.stat()).st_size, seen.st_mtime_ns] for file in files)
        except OSError as error:
            raise UserError(f"{printable(str(path))}: cannot read: {error.strerror or error}") from error
    return out


def _build(
    folder: Path,
    source: str,
    name: str,
    size: int,
    options: ReadOptions,
    max_bad: float,
    workers: int,
    decoded_gib: float,
    limit: int | None,
) -> None:
    skipped: list[Skipped] = []
    with atomic_folder(folder) as making:
        spool = Spool(making / SPOOLED)
        try:
            table = TableBuilder().extend(_rows(source, name, options, spool, skipped, limit)).build()
        finally:
            spool.close()
        check_bad(skipped, len(table) + len(skipped), max_bad)
        table = _without_twins(table, skipped)
        keep = len(table) * 3 * size * size <= decoded_gib * 2**30
        good = _decode_all(table, making / DECODED if keep else None, size, options, workers, skipped)
        check_bad(skipped, len(table) + len(skipped) - int((~good).sum()), max_bad)
        final = table.take(good).beside(making / SPOOLED, SPOOLED)
        final.save(making / TABLE)
        write_skipped(making / SKIPPED, skipped)
        write_json(making / CARD, {"pairs": len(final), "skipped": len(skipped), "decoded": keep, "source": source})


def _rows(
    source: str, name: str, options: ReadOptions, spool: Spool, skipped: list[Skipped], limit: int | None
) -> Iterator[Row]:
    count = 0
    for row in track(find_reader(name, source)[1](source, options, spool), "indexing"):
        if isinstance(row, Skipped):
            skipped.append(row)
            continue
        yield row
        count += 1
        if count == limit:
            return


def _without_twins(table: PairTable, skipped: list[Skipped]) -> PairTable:
    first = first_of_each(hash_keys(table.keys))
    skipped.extend(Skipped(table[i].key, table[i].file, "duplicate key") for i in np.flatnonzero(~first).tolist())
    return table.take(first)


def _decode_all(
    table: PairTable, path: Path | None, size: int, options: ReadOptions, workers: int, skipped: list[Skipped]
) -> np.ndarray:
    """`[n]` bool, which images decode; the pixels of those go to `path`, one after another."""
    good = np.zeros(len(table), bool)
    images = DecodedOnDemand(table, size, workers=workers, limits=options.limits)
    indices = torch.arange(len(table)).split(VERIFY_BATCH)
    with disk_errors(path or Path(SKIPPED)), open(path or os.devnull, "wb") as handle:  # noqa: PTH123
        for index, decoded in zip(indices, track(images.decoded(indices), "decoding", len(indices)), strict=True):
            if decoded.gone:
                raise UserError(decoded.gone)
            for place, reason in decoded.bad:
                row = table[int(index[place])]
                skipped.append(Skipped(row.key, row.file, reason))
            good[index[list(decoded.good)].numpy()] = True
            if path is not None:
                handle.write(decoded.images.numpy().tobytes())
    return good


def _open(folder: Path, size: int, max_bad: float, workers: int, options: ReadOptions) -> PairData:
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        pairs, skipped, kept = int(card["pairs"]), int(card["skipped"]), bool(card["decoded"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged index; delete the folder and it will be made again") from error
    if skipped > max_bad * (pairs + skipped):
        raise UserError(
            f"{skipped} of {pairs + skipped} pairs are bad, see {folder / SKIPPED}; --max-bad is {max_bad:.1%}"
        )
    table = PairTable.open(folder / TABLE)
    if not kept:
        return PairData(table, DecodedOnDemand(table, size, workers=workers, limits=options.limits), folder, skipped)
    path = folder / DECODED
    if len(table) != pairs or path.stat().st_size != pairs * 3 * size * size:
        raise UserError(f"{folder}: damaged index; delete the folder and it will be made again")
    # Copy on write: torch wants memory that it may write to, and nobody does.
    pixels = np.memmap(path, np.uint8, mode="c", shape=(pairs, size, size, 3))
    return PairData(table, torch.from_numpy(pixels).permute(0, 3, 1, 2), folder, skipped)


def copy_skipped(data: PairData, path: Path) -> None:
    """Put the list of bad pairs where a run's other files are."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data.folder / SKIPPED, path)
