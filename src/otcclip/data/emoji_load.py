"""Load the emoji corpus as a training part from all styles but one, and a test part from the style held out.

Decoded pixels are cached beside the shards, one memory-mappable array an image size (`cache/rgb48.npy`), so
only the first load at a size decodes anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from otcclip.data.atomic import atomic_file
from otcclip.data.decode import BadPair, decode_image
from otcclip.data.emoji import INDEX_COLUMNS, check_style, read_card, read_split
from otcclip.data.emoji_spec import DEFAULT_STYLE, NEAR_SIBLINGS, PLAIN_EXCLUDES
from otcclip.data.pairs import PairStore
from otcclip.data.shards import read_shard
from otcclip.errors import UserError
from otcclip.progress import track

MAX_IMAGE_SIZE = 1024


@dataclass(frozen=True)
class EmojiSplit:
    """The corpus in two parts, each sorted by key; `labels` are names, `sources` styles.

    Attributes:
        train: every style but the one held out and its near-sibling.
        test: the style held out, and only that one.
        names: sorted distinct names of train and test together: the classes of zero-shot evaluation.
        hold_out: the style of `test`.
        left_out: the near-sibling that is in neither part, or ().
    """

    train: PairStore
    test: PairStore
    names: tuple[str, ...]
    hold_out: str
    left_out: tuple[str, ...] = ()


def load_emoji(
    folder: Path | str,
    image_size: int,
    hold_out: str | None = None,
    groups_excluded: Sequence[str] = PLAIN_EXCLUDES,
) -> EmojiSplit:
    """The corpus at `folder` with images resized to `[n, image_size, image_size, 3]` (bicubic, antialiased).

    Args:
        folder: as `build_emoji` made it.
        image_size: side in pixels; 64 is as stored.
        hold_out: style of the test part; None takes the corpus's own default (twemoji unless built
            otherwise).
        groups_excluded: emojibase groups left out of both parts.

    `noto`/`noto-v1` and `fluent3d`/`fluent-emoji-flat` are one hand in two versions: when one is held out,
    the other is left out of training too, and the test part stays the one style that was named.

    Raises:
        UserError: no corpus there, an unknown style or group (the message lists them), an image size out of
            range, a damaged corpus, or a full disk.
    """
    root = Path(folder)
    card = read_card(root)
    if card is None:
        raise UserError(f"{root}: no emoji corpus here; build one with `otcclip corpus emoji --out {root}`")
    if not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise UserError(f"image size {image_size}: choose 1 to {MAX_IMAGE_SIZE} pixels")
    style = hold_out if hold_out is not None else read_split(root) or DEFAULT_STYLE
    check_style(style, tuple(card["styles"]))
    if unknown := sorted(set(groups_excluded) - set(card["groups"])):
        raise UserError(f"unknown group {unknown[0]!r}: choose from {', '.join(sorted(card['groups']))}")
    index = _read_index(root)
    images = _images(root, index, image_size)

    sibling = NEAR_SIBLINGS.get(style, "")
    styles = np.array(index["style"])
    wanted = ~np.isin(np.array(index["group"]), list(groups_excluded))
    is_test = styles == style
    in_train = ~is_test & (styles != sibling)
    train = _take(index, images, np.flatnonzero(wanted & in_train))
    test = _take(index, images, np.flatnonzero(wanted & is_test))
    names = tuple(sorted({*train.labels, *test.labels}))
    return EmojiSplit(train, test, names, style, (sibling,) if sibling in card["styles"] else ())


def _read_index(root: Path) -> dict[str, list[str]]:
    try:
        columns: dict[str, list[str]] = pq.read_table(root / "index.parquet", columns=list(INDEX_COLUMNS)).to_pydict()
        return columns
    except (OSError, pa.ArrowException) as error:
        raise _damaged(root, "index.parquet cannot be read") from error


def corpus_digest(folder: Path | str) -> str:
    """Of every image, caption and name of the corpus at `folder`: equal for two that a run cannot tell apart.

    `missing` where there is none; whoever loads it says so.
    """
    path = Path(folder) / "index.parquet"
    try:
        return _digest(path, path.stat().st_mtime_ns)
    except (OSError, pa.ArrowException):
        return "missing"


@lru_cache(maxsize=8)
def _digest(path: Path, version: int) -> str:
    table = pq.read_table(path, columns=["key", "style", "name", "group", "caption", "sha256"])
    return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()[:24]


def _take(index: dict[str, list[str]], images: NDArray[np.uint8], rows: NDArray[np.int64]) -> PairStore:
    def pick(column: str) -> tuple[str, ...]:
        return tuple(index[column][row] for row in rows)

    return PairStore(pick("key"), images[rows], pick("caption"), pick("name"), pick("style"))


def _images(root: Path, index: dict[str, list[str]], size: int) -> NDArray[np.uint8]:
    """All images in the index's order, from the cache, which is made when it is missing or not whole."""
    path = root / "cache" / f"rgb{size}.npy"
    shape = (len(index["key"]), size, size, 3)
    if path.exists():
        try:
            cached: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
            if cached.shape == shape and cached.dtype == np.uint8:
                return cached
        except (OSError, ValueError, EOFError):
            pass  # cut off or not ours: decode again
    with atomic_file(path) as handle:
        # Row by row, not through a memory map: writing to a map on a full disk kills the process.
        np.lib.format.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for image in _decode(root, index, size):
            handle.write(image.tobytes())
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


def _decode(root: Path, index: dict[str, list[str]], size: int) -> Iterator[NDArray[np.uint8]]:
    """Decode the shards in order, each image checked against the index."""
    shards = dict.fromkeys(index["shard"])
    pairs = (pair for shard in shards for pair in read_shard(root / shard))
    row = -1
    for row, pair in enumerate(track(pairs, f"decoding at {size} px", total=len(index["key"]))):
        if row >= len(index["key"]) or pair.key != index["key"][row]:
            raise _damaged(root, f"pair {pair.key} is not where the index has it")
        if hashlib.sha256(pair.image).hexdigest() != index["sha256"][row]:
            raise _damaged(root, f"the image of {pair.key} is not the one indexed")
        try:
            yield decode_image(pair.image, size)
        except BadPair as bad:
            raise _damaged(root, f"{pair.key}: {bad.reason}") from bad
    if row + 1 != len(index["key"]):
        raise _damaged(root, f"{row + 1} pairs where the index has {len(index['key'])}")


def _damaged(root: Path, what: str) -> UserError:
    return UserError(f"{root}: damaged corpus, {what}; delete the folder and build it again")


def read_groups(folder: Path | str) -> dict[str, str]:
    """The emojibase group of each pair of the corpus at `folder`, by key.

    Raises:
        UserError: no corpus there, or a damaged one.
    """
    index = _read_index(Path(folder))
    return dict(zip(index["key"], index["group"], strict=True))
