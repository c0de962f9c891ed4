"""Annotation files with a folder of images: COCO captions and Visual Genome regions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from otcclip.data.decode import BadPair, Box, printable
from otcclip.data.readers.base import ReadOptions, Spool, caption_of
from otcclip.data.shards import Skipped
from otcclip.data.table import Row
from otcclip.errors import UserError

# What a stranger's entry can raise; OverflowError: int(1e999).
_BAD_ENTRY = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def coco(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """`captions_train2017.json`: a pair for every caption, five an image or so.

    Images are looked for in `image_root`, by default where COCO unpacks them: `annotations/captions_X.json` beside
    `X/`. A pair's key is `IMAGE-ANNOTATION`, both of COCO's numbers.
    """
    del spool
    path = Path(source)
    value = _load(path)
    root = Path(options.image_root) if options.image_root else path.parent.parent / path.stem.removeprefix("captions_")
    try:
        name_of, annotations = _numbered(value["images"], "id", "file_name"), _list(value["annotations"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{printable(source)}: not COCO captions: no `images` with id and file_name, and `annotations`"
        ) from error

    def row(annotation: Any) -> tuple[str, Callable[[], Row]]:
        image, key = int(annotation["image_id"]), f"{int(annotation['image_id']):012d}-{int(annotation['id'])}"

        def read() -> Row:
            name = _inside(name_of.get(image))
            return Row(key, caption_of(_string(annotation.get("caption")), options.limits), str(root / name))

        return key, read

    yield from _rows(annotations, "annotation", source, row)


def visual_genome(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """`region_descriptions.json` with `image_data.json` beside it: a pair for every phrase, some fifty an image.

    A phrase goes with its whole image, or with its own region under `crop_regions`. Images are looked for in
    `image_root` (default: the file's folder) under the last two parts of their url, `VG_100K/1.jpg`. A pair's key is
    `IMAGE-REGION`.
    """
    del spool
    path = Path(source)
    root = Path(options.image_root) if options.image_root else path.parent
    try:
        url_of = _numbered(_load(path.parent / "image_data.json"), "image_id", "url")
        regions = _regions(_load(path))
    except TypeError as error:
        raise UserError(
            f"{printable(source)}: not Visual Genome's region descriptions beside image_data.json"
        ) from error

    def row(region: Any) -> tuple[str, Callable[[], Row]]:
        image, key = int(region["image_id"]), f"{int(region['image_id'])}-{int(region['region_id'])}"

        def read() -> Row:
            name = "/".join(_inside(url_of.get(image)).split("/")[-2:])
            box = _box(region)
            caption = caption_of(_string(region.get("phrase")), options.limits)
            return Row(key, caption, str(root / name), box=box if options.crop_regions else None)

        return key, read

    yield from _rows(regions, "region", source, row)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is expected, not {type(value).__name__}")
    return value


def _numbered(images: Any, number: str, name: str) -> dict[int, str]:
    """Name by number. An entry without either is left out: its captions are then counted as without an image.

    Raises:
        TypeError: not a list, or not one good entry in it.
    """
    found: dict[int, str] = {}
    for image in _list(images):
        try:
            found[int(image[number])] = str(image[name])
        except _BAD_ENTRY:
            continue
    if images and not found:
        raise TypeError(f"no entry has {number} and {name}")
    return found


def _regions(entries: Any) -> list[Any]:
    """Every entry's regions; in a bad entry's place None, which is no region and is counted as a broken row."""
    lists = [entry.get("regions") if isinstance(entry, dict) else None for entry in _list(entries)]
    if lists and not any(isinstance(regions, list) for regions in lists):
        raise TypeError("no entry has regions")
    return [region for regions in lists for region in (regions if isinstance(regions, list) else [None])]


def _box(region: Any) -> Box:
    x, y, width, height = (int(region[name]) for name in ("x", "y", "width", "height"))
    if not all(-(1 << 31) <= value < 1 << 31 for value in (x, y, width, height)):  # the index's numbers are int32
        raise ValueError("a box outside any image")
    return x, y, width, height


def _rows(
    entries: Iterable[Any], what: str, source: str, row: Callable[[Any], tuple[str, Callable[[], Row]]]
) -> Iterator[Row | Skipped]:
    """A row an entry. `row` gives an entry's key, and what reads the rest: a bad one is listed under its own key."""
    for number, entry in enumerate(entries):
        key = f"{what} {number}"
        try:
            key, read = row(entry)
            yield read()
        except BadPair as bad:
            yield Skipped(key, source, bad.reason)
        except _BAD_ENTRY:
            yield Skipped(key, source, "broken row")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{printable(str(path))}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(str(path))}: not JSON: {printable(str(error))}") from error


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise BadPair("no caption")
    return value.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair


def _inside(name: str | None) -> str:
    """A file name that stays in its folder: annotation files are a stranger's."""
    if not name or "\0" in name:
        raise BadPair("no image")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise BadPair("not a regular file")
    return printable(name) if "://" in name else str(path)
