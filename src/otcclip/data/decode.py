"""Decode what an enemy may have written: an allow-list of formats, caps before any work, no unpickling.

Five kinds of member are read: jpg/jpeg, png, webp, txt and json. Whatever is wrong with one is a `BadPair`
with a reason from the short list below, so bad pairs can be counted by reason; nothing here ever ends a run.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

Reason = Literal[
    "not an allowed format",
    "not a regular file",
    "member too large",
    "no image",
    "broken image",
    "too many pixels",
    "no caption",
    "empty caption",
    "caption too long",
    "caption is not UTF-8",
    "broken metadata",
    "metadata too deep",
    "duplicate key",
    "empty box",
    "broken row",
]
REASONS: tuple[str, ...] = get_args(Reason)

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
ALLOWED_EXTENSIONS = IMAGE_EXTENSIONS | {"txt", "json"}


class BadPair(Exception):
    """A pair that cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Limits:
    """Caps on what a data set may ask of us.

    Attributes:
        pixels: width x height of an image, checked from its header before it is decoded.
        member_bytes: bytes of one tar member.
        caption_chars: characters of one caption or label.
        json_depth: nesting of the metadata.
    """

    pixels: int = 64_000_000
    member_bytes: int = 64 << 20
    caption_chars: int = 4096
    json_depth: int = 16


DEFAULT_LIMITS = Limits()


Box = tuple[int, int, int, int]


def decode_image(data: bytes, size: int, limits: Limits = DEFAULT_LIMITS, box: Box | None = None) -> NDArray[np.uint8]:
    """Encoded image to `[size, size, 3]` uint8 RGB; of `box` (x, y, width, height in pixels) alone, where one is given.

    As open_clip's evaluation transform: the shorter side is resized to `size` (bicubic, antialiased), then
    the centre is cropped. Transparency is laid on white; of an animation the first frame is taken.

    Raises:
        BadPair: not jpg/png/webp by its own first bytes, too many bytes or pixels, broken, or a box outside it.
    """
    if len(data) > limits.member_bytes:
        raise BadPair("member too large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(data)
            width, height = image.size
            if width * height > limits.pixels:
                raise BadPair("too many pixels")
            region = None if box is None else _inside(box, width, height)
            if region is not None:
                width, height = region[2] - region[0], region[3] - region[1]
            # A sliver would be blown up before it is cropped: 60,000,000 x 1 is within the cap, its
            # enlargement not.
            if max(width, height) * size * size > limits.pixels * min(width, height):
                raise BadPair("too many pixels")
            return _square(_on_white(image if region is None else image.crop(region)), size)
    except BadPair:
        raise
    except Exception as error:
        # PIL's parsers raise almost anything on crafted bytes (struct.error, IndexError, MemoryError, ...).
        raise BadPair("broken image") from error


def _inside(box: Box, width: int, height: int) -> Box:
    """The box's part inside the image, as left, top, right, bottom."""
    x, y, w, h = box
    left, top, right, bottom = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
    if left >= right or top >= bottom:
        raise BadPair("empty box")
    return left, top, right, bottom


def _open(data: bytes) -> Image.Image:
    """The parser that the first bytes call for, header only.

    The plugin classes are called directly: `Image.open` has its own bomb guard, global to the process, that
    would stop us below a cap the user has raised.
    """
    kind = image_kind(data)
    if kind is None:
        raise BadPair("not an allowed format")
    return _PARSERS[kind](io.BytesIO(data))


_PARSERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}


def image_kind(data: bytes) -> str | None:
    """`png`, `jpg` or `webp` by the image's own first bytes; None for anything else."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL clips 16-bit grey to 255 instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    width, height = image.size
    scale = size / min(width, height)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def decode_caption(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str:
    """UTF-8 bytes to a caption, outer white space stripped, otherwise as it came (show it with `printable`).

    Raises:
        BadPair: not UTF-8, empty, or longer than the cap.
    """
    if len(data) > 4 * limits.caption_chars + 1024:  # before a gigabyte is decoded to be measured
        raise BadPair("caption too long")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadPair("caption is not UTF-8") from error
    if not printable(text).strip():
        raise BadPair("empty caption")
    if len(text) > limits.caption_chars:
        raise BadPair("caption too long")
    return text


_ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|\x9c|$)"  # window title, hyperlinks: up to their end
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]",
    re.DOTALL,
)
# C0, C1, zero-width, and the marks that reorder text: all can make a terminal show something else than is
# there.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` safe for a terminal: no ANSI escapes, no control characters, white space made single spaces."""
    return _CONTROL.sub("", re.sub(r"[ \t\r\n]+", " ", _ESCAPE.sub("", text)))
