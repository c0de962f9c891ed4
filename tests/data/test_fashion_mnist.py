"""Fashion-MNIST from files in its format, made small; what is not the published file is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from otcclip.data import fashion_mnist
from otcclip.data.fashion_mnist import CLASSES, build_fashion_mnist, load_fashion_mnist
from otcclip.errors import UserError

COUNTS = {"train": 30, "t10k": 12}


def idx(values: np.ndarray) -> bytes:
    """As LeCun's page describes it: 0, 0, type 8, axes, lengths big-endian, bytes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    return header + values.tobytes()


def pixels(part: str) -> np.ndarray:
    return np.random.default_rng(len(part)).integers(0, 256, (COUNTS[part], 28, 28), dtype=np.uint8)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fashion_mnist, "_COUNTS", COUNTS)
    folder = tmp_path / "tree" / "usr" / "share" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for part, n in COUNTS.items():
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels(part))))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n, dtype=np.uint8) % 10)))
    return tmp_path / "tree"


def test_photographs(tree: Path, tmp_path: Path) -> None:
    out = build_fashion_mnist(tmp_path / "fashion-mnist", tree)
    found = load_fashion_mnist(out, "train", 28, 25)
    assert found.images.shape == (25, 28, 28, 3) and found.images.dtype == np.uint8
    assert np.array_equal(found.images, 255 - pixels("train")[:25, ..., None].repeat(3, -1)), "on white"
    assert found.labels == tuple(CLASSES[i % 10] for i in range(25)) and len(set(CLASSES)) == 10
    large = load_fashion_mnist(out, "t10k", 64)
    assert large.images.shape == (12, 64, 64, 3)
    assert large.images.mean() == pytest.approx(255 - pixels("t10k").mean(), abs=2)
    assert build_fashion_mnist(out, tmp_path / "nowhere") == out, "what is there is reused"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(idx(np.zeros((12, 28, 27), np.uint8))), "not the file that was published"),
        (gzip.compress(idx(np.zeros((12, 28, 28), np.uint8))[:-1]), "not the file that was published"),
        (gzip.compress(idx(np.zeros((12, 28, 28), np.uint8)) + b"x" * 1000), "not the file that was published"),
        (gzip.compress(idx(pixels("t10k")))[:-20], "cannot be read"),
    ],
    # gzip writes the second into its header, and two workers must collect tests of the same names.
    ids=["no gzip", "narrow", "short", "long", "cut off"],
)
def test_damaged_files_are_one_line(content: bytes, says: str, tree: Path, tmp_path: Path) -> None:
    out = build_fashion_mnist(tmp_path / "out", tree)
    (out / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_fashion_mnist(out, "t10k", 28)


def test_refusals(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="get it with `otcclip corpus fashion-mnist --out"):
        load_fashion_mnist(tmp_path / "nowhere", "train", 28)
    with pytest.raises(UserError, match=r"lacks train-images-idx3-ubyte\.gz; is dataset-fashion-mnist unpacked there"):
        build_fashion_mnist(tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match="exists and is no Fashion-MNIST"):
        build_fashion_mnist(tree, tree)
    labels = tree / "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.full(12, 10, np.uint8))))
    with pytest.raises(UserError, match="damaged, a label of 10"):
        load_fashion_mnist(build_fashion_mnist(tmp_path / "out", tree), "t10k", 28)
