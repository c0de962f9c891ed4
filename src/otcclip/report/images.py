"""Image bytes from a run's files as data URIs, small enough that a page of hundreds stays one light file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

SHOWN = 128  # pixels: nothing is shown larger, so nothing larger is embedded
_RAW_LIMIT = 24_000  # bytes: a small PNG goes in as it is, lossless
_MAX_PIXELS = 64_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


def decode(data: bytes) -> Image.Image | None:
    """The image as RGB, or `None` for anything but a sound PNG of sane size."""
    if not data.startswith(_PNG):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


class Album:
    """Hands out data URIs until `budget` bytes are spent; then `None`, and the page shows a blank tile."""

    def __init__(self, budget: int = 6_000_000) -> None:
        self.left = budget
        self.omitted = 0

    def uri(self, data: bytes) -> str | None:
        image = decode(data)
        if image is None:
            return None
        kind = "png"
        if max(image.size) > SHOWN or len(data) > _RAW_LIMIT:
            kind, out = "webp", io.BytesIO()
            image.thumbnail((SHOWN, SHOWN))
            image.save(out, "WEBP", quality=85)
            data = out.getvalue()
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        if len(uri) > self.left:
            self.omitted += 1
            return None
        self.left -= len(uri)
        return uri


def changed_box(before: bytes, after: bytes) -> tuple[int, int, int, int] | None:
    """Width and height of the box in which two images differ, then the image's own; `None` if they do not."""
    a, b = decode(before), decode(after)
    if a is None or b is None or a.size != b.size:
        return None
    rows, columns = np.nonzero(np.any(np.asarray(a) != np.asarray(b), axis=2))
    if not rows.size:
        return None
    return int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1, a.width, a.height
