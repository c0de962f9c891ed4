"""Images as PNG files: what reports, galleries and new shards hold."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png(image: NDArray[np.uint8]) -> bytes:
    """`[H, W, 3]` uint8 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
