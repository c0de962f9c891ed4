"""WebDataset shards, and what `img2dataset` writes: shards with `_stats.json` beside them, or a folder of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from otcclip.data.decode import IMAGE_EXTENSIONS, BadPair, decode_caption, printable
from otcclip.data.readers.base import ReadOptions, Spool
from otcclip.data.shards import Skipped, expand_shards, locate_pairs
from otcclip.data.table import Row
from otcclip.errors import UserError


def webdataset(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """Tar shards: a brace pattern, a folder, paths or fsspec URLs joined by `::` as in open_clip."""
    del spool
    for shard in expand_shards(source.split("::")):
        yield from _shard(shard, options)


def img2dataset(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """The output folder of `img2dataset`, `--output_format webdataset` or `files`.

    A shard that holds fewer pairs than its `_stats.json` counts as downloaded is damaged.
    """
    del spool
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"{printable(source)}: img2dataset output is a folder")
    shards = sorted(folder.glob("*.tar"))
    parts = sorted(part for part in folder.iterdir() if part.is_dir() and part.name.isdigit())
    if not shards and not parts:
        raise UserError(f"{printable(source)}: no img2dataset output here (neither 00000.tar nor a folder 00000)")
    for shard in shards:
        count = 0
        for row in _shard(str(shard), options):
            count += 1
            yield row
        _check_stats(shard.with_name(f"{shard.stem}_stats.json"), str(shard), count)
    for part in parts:
        count = 0
        for row in _files(part, options):
            count += 1
            yield row
        _check_stats(part.with_name(f"{part.name}_stats.json"), str(part), count)


def _shard(shard: str, options: ReadOptions) -> Iterator[Row | Skipped]:
    skipped: list[Skipped] = []
    for located in locate_pairs(shard, limits=options.limits, on_skip=skipped.append):
        yield from skipped
        skipped.clear()
        pair = located.pair
        yield Row(pair.key, pair.caption, shard, located.offset, located.size, pair.label)
    yield from skipped


def _files(part: Path, options: ReadOptions) -> Iterator[Row | Skipped]:
    """`00000/000000012.jpg` with `000000012.txt` beside it."""
    for image in sorted(path for path in part.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS):
        text = image.with_suffix(".txt")
        key = os.fsencode(image.stem).decode("utf-8", "backslashreplace")  # a name may be any bytes, a key is text
        try:
            if not text.is_file():
                raise BadPair("no caption")
            with text.open("rb") as handle:
                caption = decode_caption(handle.read(4 * options.limits.caption_chars + 1025), options.limits)
            yield Row(key, caption, str(image))
        except BadPair as bad:
            yield Skipped(key, str(part), bad.reason)
        except OSError as error:
            raise UserError(f"{printable(str(text))}: cannot read: {error.strerror or error}") from error


def _check_stats(stats: Path, shard: str, count: int) -> None:
    if not stats.is_file():
        return
    try:
        expected = int(json.loads(stats.read_text("utf-8"))["successes"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{printable(str(stats))}: not img2dataset's statistics of a shard") from error
    if count < expected:
        raise UserError(
            f"{printable(shard)}: {count} pairs where {printable(stats.name)} counts {expected}; truncated?"
        )
