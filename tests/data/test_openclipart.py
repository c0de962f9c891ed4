"""openclipart from a made-up package tree: what is kept, how it is drawn, what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from otcclip.data import debian
from otcclip.data.openclipart import build_openclipart, drawings, load_openclipart, title_of
from otcclip.errors import UserError

SVG = """<svg><metadata><rdf:RDF><cc:Work><dc:title>{}</dc:title><dc:creator><cc:Agent><dc:title>someone</dc:title>
</cc:Agent></dc:creator></cc:Work></rdf:RDF></metadata><title>not this one</title></svg>"""


def put(
    root: Path, path: str, title: str, size: tuple[int, int] = (30, 20), *, colour: tuple[int, int, int, int]
) -> None:
    image = Image.new("RGBA", size, colour)
    for kind in ("svg", "png"):
        (root / kind / path).parent.mkdir(parents=True, exist_ok=True)
    (root / "svg" / f"{path}.svg").write_text(SVG.format(title))
    image.save(root / "png" / f"{path}.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree" / "usr" / "share" / "openclipart"
    put(root, "animals/bear_01", "Polar_bear &amp; cub", colour=(10, 0, 0, 255))
    put(root, "food/deep/apple", "Clipart by Some One - red apple", (20, 60), colour=(20, 0, 0, 255))
    put(root, "food/ghost", "ghost", colour=(0, 0, 0, 0))
    put(root, "computer/mouse", "mouse", colour=(30, 0, 0, 255))
    put(root, "people/numbers", "12 34", colour=(40, 0, 0, 255))
    put(root, "people/untitled", "", colour=(50, 0, 0, 255))
    for i in range(4):
        put(root, f"signs/card_{i}", "Card", colour=(60 + i, 0, 0, 255))
    for i in range(3):
        put(root, f"signs/star_{i}", "star", colour=(70 + i, 0, 0, 255))
    put(root, "animals/copy", "the same bear", colour=(10, 0, 0, 255))
    (root / "svg" / "animals" / "no_png.svg").write_text(SVG.format("no png"))
    return tmp_path / "tree"


def test_what_is_kept(tree: Path) -> None:
    found = {drawing.key: (drawing.title, drawing.folder) for drawing in drawings(tree / "usr/share/openclipart")}
    assert found == {
        "animals-bear_01": ("Polar bear & cub", "animals"),
        "food-deep-apple": ("red apple", "food"),
        "food-ghost": ("ghost", "food"),
        **{f"signs-star_{i}": ("star", "signs") for i in range(3)},
    }


def test_corpus(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "openclipart"
    assert build_openclipart(out, tree) == 6
    assert json.loads((out / "card.json").read_text())["licence"] == "public domain"
    store = load_openclipart(out, 64)
    row = {key: i for i, key in enumerate(store.keys)}
    assert store.captions[row["animals-bear_01"]] == "Polar bear & cub" and store.labels[row["food-ghost"]] == "food"
    wide, tall, ghost = (store.images[row[key]] for key in ("animals-bear_01", "food-deep-apple", "food-ghost"))
    # The whole drawing on a white square: 30 x 20 fills the width and two thirds of the height.
    assert wide[32, 0].tolist() == wide[32, 63].tolist() == [10, 0, 0] and wide[4, 32].tolist() == [255, 255, 255]
    assert (wide[:, 32, 1] < 128).sum() == pytest.approx(64 * 2 / 3, abs=2)
    assert (tall[32, :, 1] < 128).sum() == pytest.approx(64 / 3, abs=2)
    assert (ghost == 255).all(), "transparent is white"
    shutil.rmtree(tree)
    assert build_openclipart(out) == 6, "what is there is reused"


def test_images_too_large_or_broken_are_left_out(tree: Path, tmp_path: Path) -> None:
    png = tree / "usr/share/openclipart/png"
    (png / "signs" / "star_0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    bomb = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(bomb, "PNG")
    (png / "signs" / "star_1.png").write_bytes(bomb.getvalue())
    assert build_openclipart(tmp_path / "out", tree) == 4
    assert "signs-star_2" in load_openclipart(tmp_path / "out", 8).keys


def test_title_is_the_works_own() -> None:
    assert title_of(SVG.format("A_title").encode()) == "A title"
    assert title_of(b"<svg><title>another</title></svg>") == ""
    assert title_of(SVG.format("caf\xe9 \x1b[31mred").encode("latin-1")) == "caf\ufffd red"


def test_refusals(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no openclipart corpus"):
        build_openclipart(tmp_path / "full", tree)
    with pytest.raises(UserError, match="holds no openclipart images"):
        build_openclipart(tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match="build one with `otcclip corpus openclipart"):
        load_openclipart(tmp_path, 64)
    monkeypatch.setattr(debian.shutil, "which", lambda tool: None)
    with pytest.raises(UserError, match="openclipart-png, openclipart-svg, and apt-get was not found"):
        build_openclipart(tmp_path / "out")
    assert not (tmp_path / "out").exists() and np.array_equal(
        sorted(p.name for p in tmp_path.iterdir()), ["full", "tree"]
    )


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools are stand-ins: one that complains as apt does."""
    (tmp_path / "apt-get").write_text(
        "#!/bin/sh\necho 'W: noise' >&2; echo 'E: Unable to locate package x' >&2; exit 100\n"
    )
    (tmp_path / "dpkg-deb").write_text("#!/bin/sh\n")
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"^apt-get failed: Unable to locate package x \(try `apt-get update`\)$"):
        debian.unpack(["x"], tmp_path)
