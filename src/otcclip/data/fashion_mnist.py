"""Fashion-MNIST: 70,000 grey product photographs of 28 pixels in ten classes, from a Debian package.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017, arXiv
1708.07747. The corpus's folder holds the package's four files as they are.
"""

from __future__ import annotations

import gzip
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from otcclip.data import debian
from otcclip.data.atomic import atomic_folder
from otcclip.errors import UserError

PACKAGE = "dataset-fashion-mnist"
SIDE = 28
# fmt: off
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)
# fmt: on
_COUNTS = {"train": 60_000, "t10k": 10_000}
_FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in _COUNTS for kind in ("images-idx3", "labels-idx1"))


@dataclass(frozen=True)
class Photos:
    """`images` `[n, size, size, 3]` uint8 on white, `labels` `n` class names."""

    images: NDArray[np.uint8]
    labels: tuple[str, ...]


def build_fashion_mnist(out: Path | str, root: Path | None = None) -> Path:
    """Put the package's files into `out`; a folder that has them is used as it is.

    Args:
        root: where the package is unpacked (`/` if it is installed); by default it is downloaded.

    Raises:
        UserError: no apt, no network, a full disk, or a folder at `out` that is something else.
    """
    folder = Path(out)
    if all((folder / name).exists() for name in _FILES):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no Fashion-MNIST; name another folder")
    with tempfile.TemporaryDirectory(prefix="otcclip-apt-") as scratch:
        tree = root if root is not None else debian.unpack([PACKAGE], Path(scratch))
        source = tree / "usr" / "share" / "datasets" / "fashion-mnist"
        if lacking := [name for name in _FILES if not (source / name).exists()]:
            raise UserError(f"{source}: lacks {lacking[0]}; is {PACKAGE} unpacked there?")
        with atomic_folder(folder) as temporary:
            for name in _FILES:
                (temporary / name).write_bytes((source / name).read_bytes())
    return folder


def load_fashion_mnist(folder: Path | str, part: str, image_size: int, count: int | None = None) -> Photos:
    """The first `count` photographs (all by default) of `part`: `train` (60,000) or `t10k` (10,000).

    Grey is inverted (the garments stand on black in the files, on white on the web) and resized, bicubic.

    Raises:
        UserError: not there (says how to get it) or damaged.
    """
    root = Path(folder)
    if not all((root / name).exists() for name in _FILES):
        raise UserError(f"{root}: no Fashion-MNIST here; get it with `otcclip corpus fashion-mnist --out {root}`")
    total = _COUNTS[part]
    pixels = _idx(root / f"{part}-images-idx3-ubyte.gz", (total, SIDE, SIDE))[:count]
    labels = _idx(root / f"{part}-labels-idx1-ubyte.gz", (total,))[:count]
    if labels.max() >= len(CLASSES):
        raise UserError(f"{root}: damaged, a label of {labels.max()}")
    grey = (Image.fromarray(255 - one).resize((image_size, image_size), Image.Resampling.BICUBIC) for one in pixels)
    images = np.stack([np.asarray(one) for one in grey])[..., None].repeat(3, axis=-1)
    return Photos(images, tuple(CLASSES[i] for i in labels))


def _idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes: magic 0, 0, 8, number of axes, then each axis's length, all big-endian."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    size = len(header) + int(np.prod(shape))
    try:
        with gzip.open(path) as handle:
            data = handle.read(size + 1)  # one byte more than there may be: a file of any size is not unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from error
    if len(data) != size or not data.startswith(header):
        raise UserError(f"{path}: not the file that was published")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
