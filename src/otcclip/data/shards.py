"""WebDataset shards: write them with the same bytes each time, read them as if an enemy had written them.

Written with `webdataset.TarWriter`. Read with the standard library's `tarfile`, not through webdataset: its
default decoders unpickle and its `gopen` runs `pipe:` commands. Member names are keys, never paths: nothing
is extracted.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from otcclip.data.atomic import atomic_file
from otcclip.data.decode import (
    DEFAULT_LIMITS,
    IMAGE_EXTENSIONS,
    BadPair,
    Limits,
    Reason,
    decode_caption,
    image_kind,
    printable,
)
from otcclip.data.members import Member, members_of, split_name
from otcclip.data.metadata import fields_of, parse_metadata, strings_of, writable
from otcclip.data.names import KEY_FIELD, key_of, member_name
from otcclip.data.pairs import Pair
from otcclip.errors import UserError


@dataclass(frozen=True)
class Skipped:
    """A pair that was not used: its key, the shard it stands in, and why."""

    key: str
    shard: str
    reason: Reason


def write_shard(path: Path | str, pairs: Iterable[Pair], image_extension: str | None = "png") -> int:
    """Write pairs as `<key>.<image_extension>`, `<key>.txt`, `<key>.json`; the number of pairs.

    With no `image_extension` each image gets that of its own first bytes (`png` where they say nothing).

    The same pairs give the same bytes: no times, users or hash order. The json member holds the pair's
    metadata, its label, where it has one, and its `fields`. A key that is no safe name of a member (`im/0.png`,
    `../x`) is percent-encoded there and stands in the json member as `__key__`; `read_shard` gives it back.

    Raises:
        UserError: the disk cannot be written to, or a pair is no text or has metadata called `__key__`; nothing is
            left behind.
    """
    import webdataset  # two seconds of import, needed only here

    written = 0
    with atomic_file(path) as handle:
        # A time that is a whole number, or every member gets a header of its own for the fraction: 1 KB more to walk.
        writer = webdataset.TarWriter(handle, encoder=False, mtime=0, user="", group="", mode=0o644)
        try:
            for pair in pairs:
                writer.write(_members_of(pair, image_extension))
                written += 1
            writer.close()
        except BaseException:
            # Closed while the file still is open, or tarfile complains on stderr when it is collected.
            with contextlib.suppress(OSError):
                writer.close()
            raise
    return written


def _members_of(pair: Pair, image_extension: str | None) -> dict[str, str | bytes]:
    shown = printable(pair.key)[:60]
    if KEY_FIELD in pair.metadata:
        raise UserError(f"pair {shown!r}: its metadata hold {KEY_FIELD!r}, the name that keys are kept under")
    fields = fields_of(pair)
    try:
        name = member_name(pair.key)
        fields |= {} if name == pair.key else {KEY_FIELD: pair.key}
        return {
            "__key__": name,
            image_extension or image_kind(pair.image) or "png": pair.image,
            "txt": pair.caption.encode(),
            "json": json.dumps(fields, sort_keys=True, ensure_ascii=False).encode(),
        }
    except UnicodeEncodeError as error:
        raise UserError(f"pair {shown!r}: holds characters that UTF-8 cannot write") from error


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths or URLs from a brace pattern (`{00000..00041}.tar`), a folder of tars, or a list of either.

    Raises:
        UserError: a `pipe:` address, an empty folder, a pattern that is not one, or no shards at all.
    """
    items = [shards] if isinstance(shards, str | Path) else list(shards)
    found: list[str] = []
    for item in items:
        text = str(item)
        if text.startswith("pipe:"):
            raise UserError(f"{printable(text)}: 'pipe:' shards run a command and are not read")
        try:
            names = list(braceexpand(text)) if "{" in text else [text]
        except ValueError as error:
            raise UserError(f"{printable(text)}: not a brace pattern: {error}") from error
        for name in names:
            if "://" not in name and Path(name).is_dir():
                inside = sorted(str(path) for path in Path(name).glob("*.tar"))
                if not inside:
                    raise UserError(f"{printable(name)}: no .tar shard in this folder")
                found.extend(inside)
            else:
                found.append(name)
    if not found:
        raise UserError("no shard was named")
    return found


def read_shard(
    shard: str | Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    on_skip: Callable[[Skipped], None] | None = None,
    fields: bool = False,
) -> Iterator[Pair]:
    """The pairs of one tar (local path or fsspec URL), in its order; images stay encoded.

    `label` and `metadata` come from the json member, and the key where that is no name of a member. Members of
    other kinds are never opened; a pair without an image because its image is of another kind is skipped as "not
    an allowed format". Skipped pairs go to `on_skip`. With `fields` each pair carries its json member whole, to be
    written back.

    Raises:
        UserError: the shard is missing, not an (uncompressed) tar, truncated or damaged.
    """
    for located in locate_pairs(shard, limits=limits, on_skip=on_skip, images=True, fields=fields):
        yield located.pair


@dataclass(frozen=True)
class Located:
    """A pair of a shard and where its encoded image lies: `size` bytes from `offset` of the (uncompressed) tar."""

    pair: Pair
    offset: int
    size: int


def locate_pairs(
    shard: str | Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    on_skip: Callable[[Skipped], None] | None = None,
    images: bool = False,
    fields: bool = False,
) -> Iterator[Located]:
    """The pairs of one tar as `read_shard` gives them, with the place of each image in the tar.

    Without `images` the images are passed over unread (`pair.image` is empty), so a shard is indexed at the cost of its
    captions. Without `fields` the json member's nested values are let go.

    Raises:
        UserError: as `read_shard`.
    """
    name = str(shard)
    for key, members in _samples(name, limits, images):
        try:
            yield _located(key, members, limits, fields)
        except BadPair as bad:
            if on_skip is not None:
                on_skip(Skipped(key, name, bad.reason))


def _located(key: str, members: dict[str, Member], limits: Limits, fields: bool) -> Located:
    for member in members.values():
        if isinstance(member.content, str) and member.content != "not an allowed format":
            raise BadPair(member.content)
    read = {ext: member for ext, member in members.items() if isinstance(member.content, bytes)}
    image = next((read[ext] for ext in sorted(IMAGE_EXTENSIONS) if ext in read), None)
    if image is None:
        raise BadPair("not an allowed format" if len(read) < len(members) else "no image")
    data = {ext: member.content for ext, member in read.items() if isinstance(member.content, bytes)}
    if "txt" not in data:
        raise BadPair("no caption")
    caption = decode_caption(data["txt"], limits)
    parsed = parse_metadata(data["json"], limits) if "json" in data else {}
    metadata = strings_of(parsed)
    label = metadata.pop("label", None)
    key = key_of(key, metadata)
    assert isinstance(image.content, bytes)
    pair = Pair(key, image.content, caption, label, metadata, writable(parsed) if fields else {})
    return Located(pair, image.offset, image.size)


def _samples(shard: str, limits: Limits, images: bool) -> Iterator[tuple[str, dict[str, Member]]]:
    """Neighbouring members of one key, by extension."""
    key: str | None = None
    members: dict[str, Member] = {}
    for member in members_of(shard, limits, images):
        stem, extension = split_name(member.name)
        if stem != key:
            if key is not None:
                yield key, members
            key, members = stem, {}
        members[extension] = member
    if key is not None:
        yield key, members


def count_reasons(skipped: Iterable[Skipped]) -> str:
    """`3 broken image, 1 empty caption`, most frequent first."""
    counts = Counter(record.reason for record in skipped)
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))
