"""Annotation files with a folder of images: COCO captions and Visual Genome regions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from otcclip.data.decode import BadPair, printable
from otcclip.data.readers.base import ReadOptions, Spool, caption_of
from otcclip.data.shards import Skipped
from otcclip.data.table import Row
from otcclip.errors import UserError


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
        name_of = {int(image["id"]): str(image["file_name"]) for image in value["images"]}
        annotations = value["annotations"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not COCO captions: no `images` with id and file_name, and `annotations`") from error

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
        url_of = {int(image["image_id"]): str(image["url"]) for image in _load(path.parent / "image_data.json")}
        regions = [region for entry in _load(path) for region in entry["regions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: not Visual Genome's region descriptions beside image_data.json") from error

    def row(region: Any) -> tuple[str, Callable[[], Row]]:
        image, key = int(region["image_id"]), f"{int(region['image_id'])}-{int(region['region_id'])}"

        def read() -> Row:
            name = "/".join(_inside(url_of.get(image)).split("/")[-2:])
            box = (int(region["x"]), int(region["y"]), int(region["width"]), int(region["height"]))
            caption = caption_of(_string(region.get("phrase")), options.limits)
            return Row(key, caption, str(root / name), box=box if options.crop_regions else None)

        return key, read

    yield from _rows(regions, "region", source, row)


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
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            yield Skipped(key, source, "broken row")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error


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
