"""The ten emoji styles as planned pairs: which name each style draws, and how one drawing becomes a PNG.

The recipe behind the counts: emojibase's emoji with a group, without `component` (bare skin tones and hair).
A style's icon is found by its hexcode through the style's `chars.json` where it has one, else by the label's
slug (apostrophes dropped, `&` as "and"), else, for fxemoji, by the slug without hyphens (`alarmclock`);
aliases are followed. Skin tones are no names of their own.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from otcclip.data.decode import BadPair, decode_image
from otcclip.data.emoji_spec import FLUENT_3D, NAMES_PACKAGE, RENDER_SIZE, EmojiSpec
from otcclip.data.pairs import Pair
from otcclip.errors import UserError


@dataclass(frozen=True)
class Emoji:
    """An emoji as emojibase names it."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str

    @property
    def caption(self) -> str:
        return f"{self.name} | {', '.join(self.tags)}" if self.tags else self.name


@dataclass(frozen=True)
class Drawing:
    """One style's picture of one emoji, not yet drawn: an SVG document, or the path of an image file."""

    emoji: Emoji
    style: str
    source: str | Path

    @property
    def key(self) -> str:
        return f"{self.style}_{self.emoji.hexcode.lower()}"


def plan(node_modules: Path, spec: EmojiSpec) -> list[Drawing]:
    """Every (style, emoji) the packages can draw, sorted by key; nothing is drawn yet.

    Raises:
        UserError: a file of a package is missing or not what it should be.
    """
    emojis = read_emojis(node_modules / NAMES_PACKAGE)
    drawings: list[Drawing] = []
    for package in spec.packages:
        if package.style is None:
            continue
        folder = node_modules / package.name
        if package.name == FLUENT_3D:
            drawings.extend(_from_files(folder / "assets", package.style, emojis))
        else:
            drawings.extend(_from_iconify(folder, package.style, emojis))
    return sorted(drawings, key=lambda drawing: drawing.key)


def read_emojis(folder: Path) -> list[Emoji]:
    """The emoji of `emojibase-data` that have a group other than `component`."""
    groups = read_json(folder / "meta" / "groups.json")["groups"]
    emojis = []
    for entry in read_json(folder / "en" / "data.json"):
        group = groups.get(str(entry.get("group")))
        if group is not None and group != "component":
            emojis.append(Emoji(entry["hexcode"], entry["label"], tuple(entry.get("tags", ())), group))
    return emojis


def read_json(path: Path) -> Any:
    """A package's JSON file. Raises UserError naming the file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read this file of an npm package: {error}") from error


def plain_hex(hexcode: str) -> str:
    """Lower case and without the variation selector FE0F, which the packages put differently."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def slug(label: str) -> str:
    """Iconify's file name for a label: `man’s shoe` is `mans-shoe`, `piñata` is `pinata`."""
    text = unicodedata.normalize("NFKD", label.lower().replace("’", "'")).encode("ascii", "ignore").decode()
    text = re.sub(r"['.!\"]", "", text).replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _from_files(assets: Path, style: str, emojis: list[Emoji]) -> Iterator[Drawing]:
    files = {plain_hex(path.stem): path for path in sorted(assets.glob("*.webp"))}
    for emoji in emojis:
        if (path := files.get(plain_hex(emoji.hexcode))) is not None:
            yield Drawing(emoji, style, path)


def _from_iconify(folder: Path, style: str, emojis: list[Emoji]) -> Iterator[Drawing]:
    icons = read_json(folder / "icons.json")
    chars_file = folder / "chars.json"
    chars = read_json(chars_file) if chars_file.exists() else {}
    by_hex = {plain_hex(code): name for code, name in chars.items()}
    for emoji in emojis:
        name = slug(emoji.name)
        candidates = [by_hex.get(plain_hex(emoji.hexcode)), name]
        if style == "fxemoji":
            candidates.append(name.replace("-", ""))
        for candidate in candidates:
            document = _svg(icons, candidate) if candidate else None
            if document is not None:
                yield Drawing(emoji, style, document)
                break


def _svg(icons: Mapping[str, Any], name: str) -> str | None:
    """The icon as an SVG document, following aliases and their flips; None when the set lacks it."""
    flip_x = flip_y = False
    aliases = icons.get("aliases", {})
    for _ in range(8):  # longer chains would be a loop
        if name in icons["icons"]:
            break
        if name not in aliases:
            return None
        flip_x ^= bool(aliases[name].get("hFlip"))
        flip_y ^= bool(aliases[name].get("vFlip"))
        name = aliases[name]["parent"]
    else:
        return None
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if flip_x or flip_y:
        move_x, move_y = (2 * left + width) * flip_x, (2 * top + height) * flip_y
        scale = f"{-1 if flip_x else 1} {-1 if flip_y else 1}"
        body = f'<g transform="translate({move_x} {move_y}) scale({scale})">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{RENDER_SIZE}" height="{RENDER_SIZE}">{body}</svg>'
    )


def draw(drawing: Drawing) -> Pair:
    """The drawing as a pair: a 64 px PNG on white, `name | tags`, and where it comes from.

    Raises:
        UserError: the package's picture cannot be drawn.
    """
    try:
        if isinstance(drawing.source, Path):
            encoded = drawing.source.read_bytes()
        else:
            # No system fonts: the pixels must not depend on the machine.
            encoded = bytes(
                resvg_py.svg_to_bytes(
                    svg_string=drawing.source, width=RENDER_SIZE, height=RENDER_SIZE, skip_system_fonts=True
                )
            )
        pixels = decode_image(encoded, RENDER_SIZE)
    except (OSError, ValueError, BadPair) as error:
        raise UserError(f"{drawing.style}: cannot draw {drawing.emoji.name!r}: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    metadata = {
        "source": drawing.style,
        "group": drawing.emoji.group,
        "hexcode": drawing.emoji.hexcode,
    }
    return Pair(drawing.key, buffer.getvalue(), drawing.emoji.caption, drawing.emoji.name, metadata)
