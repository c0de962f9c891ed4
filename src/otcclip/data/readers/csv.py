"""CSV as open_clip reads it: a header, `filepath` and `title`, separated by tabs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from otcclip.data.decode import BadPair, printable
from otcclip.data.readers.base import Occurrences, ReadOptions, Spool, caption_of
from otcclip.data.shards import Skipped
from otcclip.data.table import Row
from otcclip.errors import UserError


def csv_pairs(source: str, options: ReadOptions, spool: Spool) -> Iterator[Row | Skipped]:
    """A row a pair. Paths are relative to the working directory, as in open_clip, or to `image_root`.

    A pair's key is its image's path as written, with `#1`, `#2`, … for further rows of the same image.

    Raises:
        UserError: no such file, no such columns, or a separator that is none.
    """
    del spool
    separator = _separator(options.separator)
    image, caption = options.img_key or "filepath", options.caption_key or "title"
    root = Path(options.image_root or ".")
    keys = Occurrences()
    try:
        # Bytes that are not UTF-8 spoil a pair, not the file.
        with Path(source).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            rows = csv.DictReader(handle, delimiter=separator)
            _check_header(_names(rows, source), image, caption, separator, source)
            while True:
                number = rows.line_num
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error:  # a field of more than 128 KiB, a stray carriage return
                    yield Skipped(f"line {number + 1}", source, "broken row")
                    continue
                yield _row(row.get(image), row.get(caption), f"line {number + 1}", source, root, keys, options)
    except OSError as error:
        raise UserError(f"{printable(source)}: cannot read: {error.strerror or error}") from error


def _row(
    path: str | None, text: str | None, line: str, source: str, root: Path, keys: Occurrences, options: ReadOptions
) -> Row | Skipped:
    if not path or "\0" in path:
        return Skipped(line, source, "no image")
    key = keys.key(path.encode("utf-8", "replace").decode())
    try:
        if text is None:
            raise BadPair("no caption")
        return Row(key, caption_of(text, options.limits), path if "://" in path else str(root / path))
    except BadPair as bad:
        return Skipped(key, source, bad.reason)


def _separator(text: str) -> str:
    r"""The one character between columns; `\t`, as shells pass it on, is a tab."""
    separator = "\t" if text == r"\t" else text
    if len(separator) != 1 or separator in '"\r\n\0':
        raise UserError(rf"--csv-separator {text!r}: one character, no quote and no line's end (\t is a tab)")
    return separator


def _names(rows: csv.DictReader[str], source: str) -> list[str]:
    try:
        return [str(name) for name in rows.fieldnames or ()]
    except csv.Error as error:  # a field of more than 128 KiB
        raise UserError(f"{printable(source)}: its first line is no header: {printable(str(error))}") from error


def _check_header(found: list[str], image: str, caption: str, separator: str, source: str) -> None:
    for wanted, flag in ((image, "--csv-img-key"), (caption, "--csv-caption-key")):
        if wanted not in found:
            columns = ", ".join(repr(printable(name)) for name in found[:20])
            raise UserError(
                f"{printable(source)}: no column {wanted!r} ({flag}); split at {separator!r} (--csv-separator) its "
                f"columns are {columns or 'none'}"
            )
