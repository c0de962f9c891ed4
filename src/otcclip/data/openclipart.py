"""openclipart: drawings with the titles their authors gave them, from two Debian packages (CORPUS section 2).

    out/00000.tar     pairs: PNG on a white square, the title as caption, the package's folder as label
    out/card.json     packages, counts, licence

Public domain, and noisy like the web: foreign titles, titles of whole series, thousands of copies. Used to measure
models, not to train them. A title is kept if it has a word and stands on at most `MAX_SHARED` different images.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from PIL import Image, ImageOps

from otcclip.data import debian
from otcclip.data.atomic import atomic_folder, write_json
from otcclip.data.decode import DEFAULT_LIMITS, printable
from otcclip.data.pairs import Pair, PairStore
from otcclip.data.shards import write_shard
from otcclip.data.store import load_store
from otcclip.errors import UserError
from otcclip.progress import track

PACKAGES = ("openclipart-png", "openclipart-svg")
CORPUS = "otcclip-openclipart"
DROPPED = ("computer", "shapes", "special")  # logos, geometry, tests of renderers
MAX_SHARED = 3  # a title on more images than this names the series, not the image
SIZE = 128
_WORK = re.compile(rb"<(?:\w+:)?Work\b.*?</(?:\w+:)?Work>", re.DOTALL)
_TITLE = re.compile(rb"<dc:title>(.*?)</dc:title>", re.DOTALL)


@dataclass(frozen=True)
class Drawing:
    """One image of the packages: its path below the package's folder, its title, its top folder."""

    png: Path
    key: str
    title: str
    folder: str


def build_openclipart(out: Path | str, root: Path | None = None) -> int:
    """Build the corpus at `out`; the number of pairs. A corpus already there is used as it is.

    Args:
        root: where the packages are unpacked (`/` if they are installed); by default they are downloaded.

    Raises:
        UserError: no apt, no network, a full disk, or a folder at `out` that is no such corpus.
    """
    folder = Path(out)
    if _is_corpus(folder):
        return int(json.loads((folder / "card.json").read_text("utf-8"))["pairs"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no openclipart corpus; name another folder")
    with tempfile.TemporaryDirectory(prefix="otcclip-apt-") as scratch:
        tree = root if root is not None else debian.unpack(PACKAGES, Path(scratch))
        found = drawings(tree / "usr" / "share" / "openclipart")
        with atomic_folder(folder) as temporary:
            pairs = write_shard(temporary / "00000.tar", _drawn(found))
            card = {"corpus": CORPUS, "packages": list(PACKAGES), "pairs": pairs, "licence": "public domain"}
            write_json(temporary / "card.json", card)
    return pairs


def load_openclipart(folder: Path | str, image_size: int) -> PairStore:
    """The corpus at `folder`; captions are titles, labels the packages' folders.

    Raises:
        UserError: no such corpus there; says how to get it.
    """
    root = Path(folder)
    if not _is_corpus(root):
        raise UserError(f"{root}: no openclipart corpus here; build one with `otcclip corpus openclipart --out {root}`")
    return load_store(root, image_size)


def _is_corpus(folder: Path) -> bool:
    try:
        card = json.loads((folder / "card.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("corpus") == CORPUS and isinstance(card.get("pairs"), int)


def drawings(root: Path) -> list[Drawing]:
    """The usable images below `root`, sorted by key; each image once, however often it was linked or copied.

    Raises:
        UserError: no such packages there.
    """
    seen: set[str] = set()
    found: list[Drawing] = []
    for svg in sorted((root / "svg").rglob("*.svg")):
        below = svg.relative_to(root / "svg")
        png = (root / "png" / below).with_suffix(".png")
        title = title_of(svg.read_bytes())
        if below.parts[0] in DROPPED or not png.exists() or not re.search(r"[^\W\d_]{3}", title):
            continue
        digest = hashlib.sha256(png.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            found.append(Drawing(png, "-".join(below.with_suffix("").parts).replace(".", "_"), title, below.parts[0]))
    shared = Counter(drawing.title.lower() for drawing in found)
    usable = [drawing for drawing in found if shared[drawing.title.lower()] <= MAX_SHARED]
    if not usable:
        raise UserError(f"{root}: holds no openclipart images; are {' and '.join(PACKAGES)} unpacked there?")
    return sorted(usable, key=lambda drawing: drawing.key)


def title_of(svg: bytes) -> str:
    """The title in the RDF of an SVG's work (not its creator's or publisher's, which come later), as plain words."""
    work = _WORK.search(svg)
    title = _TITLE.search(work.group()) if work else None
    text = unescape(title.group(1).decode("utf-8", "replace")) if title else ""
    # One artist's titles open with his name and a dash.
    return printable(re.sub(r"^clipart by .*? - ", "", text.replace("_", " "), flags=re.IGNORECASE)).strip()


def _drawn(found: list[Drawing]) -> Iterator[Pair]:
    for drawing in track(found, "drawing openclipart"):
        image = _on_square(drawing.png.read_bytes())
        if image is not None:
            yield Pair(drawing.key, image, drawing.title, drawing.folder, {"source": "openclipart"})


def _on_square(data: bytes) -> bytes | None:
    """The whole drawing in the middle of a white square, as PNG; None where it is broken or too large.

    Reading a corpus crops the centre, which would cut off what the title names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.width * image.height > DEFAULT_LIMITS.pixels:
            return None
        drawn = ImageOps.contain(image.convert("RGBA"), (SIZE, SIZE), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    square = Image.new("RGBA", (SIZE, SIZE), "white")
    square.alpha_composite(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
    buffer = io.BytesIO()
    square.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
