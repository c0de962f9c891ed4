"""What a descriptor sees under a view, and above all what it does not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip.evidence.descriptors import BINS, GRID, View, _orientations, descriptors, views

CELL = 64 // GRID


@pytest.fixture(scope="module")
def pictures(make_store) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.from_numpy(make_store(12, 12).images).permute(0, 3, 1, 2)


def by_name(images: Tensor, wanted: tuple[View, ...] | None = None, **options: int) -> dict[str, Tensor]:
    return {view.name: vectors for view, vectors in descriptors(images, wanted or views(), **options)}


def test_views_cover_the_image_and_three_bands() -> None:
    found = views()
    assert len({view.name for view in found}) == len(found) == 13
    assert found[0].name == "whole" and found[0].band == "all", "copies are told by the first view"
    windows = [view for view in found if view.mask.min() == 0]
    assert len(windows) == 9 and {view.band for view in windows} == {"all"}
    for view in windows:
        gone = (view.mask == 0).nonzero()
        top, left = gone.amin(0).tolist()
        side = GRID // 2
        assert len(gone) == side**2 and (view.mask[top : top + side, left : left + side] == 0).all()
    assert (torch.stack([view.mask for view in windows]).amin(0) == 0).all(), "a cell that no view removes"
    assert sorted(view.band for view in found if view.band != "all") == ["fine", "high", "low"]


def test_vectors_are_unit_and_come_once_a_view(pictures: Tensor) -> None:
    wanted = (views()[11], views()[0], views()[3])
    got = list(descriptors(pictures, wanted))
    assert sorted(view.name for view, _ in got) == sorted(view.name for view in wanted)
    for _, vectors in got:
        assert len(vectors) == len(pictures)
        torch.testing.assert_close(vectors.float().norm(dim=1), torch.ones(len(pictures)), atol=1e-2, rtol=0)


def test_vectors_are_centred(pictures: Tensor) -> None:
    """Cosine 0 means as alike as any two, also where all share an outline or a layout of colours."""
    shared = torch.zeros(3, 64, 64, dtype=torch.int32)
    shared[0, :32], shared[2, 32:], shared[:, 20:24] = 120, 120, 120
    vectors = by_name((pictures.int() // 4 + shared).to(torch.uint8))["whole"].float()
    cosine = vectors @ vectors.T
    off = cosine[~torch.eye(len(pictures), dtype=torch.bool)]
    assert abs(float(off.mean())) < 0.12


@pytest.mark.parametrize("window", range(1, 10))
def test_what_lies_in_a_removed_window_is_not_seen(pictures: Tensor, window: int) -> None:
    """Two pictures of one batch that differ in the window alone (their centring is the same) get one vector.

    The change stays a pixel inside the window: the gradient of the pixels around it looks one pixel in.
    """
    view = views()[window]
    top, left = ((view.mask == 0).nonzero().amin(0) * CELL).tolist()
    changed = pictures[:1].clone()
    inside = changed[..., top + 1 : top + 4 * CELL - 1, left + 1 : left + 4 * CELL - 1]
    inside.copy_(torch.randint(0, 256, inside.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    got = by_name(torch.cat([changed, pictures]))
    assert torch.equal(got[view.name][0], got[view.name][1])
    for other in ("whole", "low band", "high band"):
        assert float(got[other][0].float() @ got[other][1].float()) < 0.97, f"{other} does not see the change"


def test_bands(pictures: Tensor) -> None:
    """Fine stripes are for the high band alone; a slow shading is for the low band alone."""
    base = pictures[:1].int() // 4 + 96
    stripes = torch.tensor([-30, 30]).repeat(32)  # along a row; the mean colour stays
    shading = torch.zeros(3, 64, 1, dtype=torch.int32)
    shading[0, :, 0] = torch.linspace(0, 80, 64).round()
    got = by_name(torch.cat([base, base + stripes, base + shading, pictures]).to(torch.uint8))

    def cosine(view: str, i: int) -> float:
        return float(got[view][0].float() @ got[view][i].float())

    assert cosine("low band", 1) > 0.95 > 0.9 > cosine("high band", 1)
    assert cosine("high band", 2) > 0.9 > cosine("low band", 2)


def test_a_smooth_pattern_laid_over_a_picture_leaves_its_outlines(pictures: Tensor) -> None:
    """Blending shades every cell; what the finest band sees of it is least."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(1, 3, 4, 4, generator=generator) * 120
    pattern = torch.nn.functional.interpolate(noise, size=64, mode="bicubic")
    blended = (pictures * 0.6 + pattern * 0.8).clamp(0, 255).to(torch.uint8)
    got = by_name(torch.cat([pictures, blended]))
    n = len(pictures)

    def kept(view: str) -> float:
        return float((got[view][:n].float() * got[view][n:].float()).sum(dim=1).mean())

    assert kept("fine band") > max(kept("whole"), kept("low band")) + 0.1


def test_flat_pictures_are_finite(pictures: Tensor) -> None:
    flat = torch.full_like(pictures[:2], 255)
    for vectors in by_name(torch.cat([flat, pictures])).values():
        assert torch.isfinite(vectors.float()).all()
        assert torch.equal(vectors[0], vectors[1])


def test_chunks_do_not_matter(pictures: Tensor) -> None:
    whole, cut = by_name(pictures), by_name(pictures, chunk=5)
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(cut[name].float(), whole[name].float(), atol=1e-2, rtol=0)


def test_orientations_are_those_of_the_arctangent() -> None:
    """Against the definition, pixel by pixel in float64; lines along the axes and the diagonals among them."""
    rng = np.random.default_rng(0)
    luma = rng.random((3, 12, 20)).astype(np.float32)
    luma[1] = np.arange(20, dtype=np.float32) / 20  # all gradients along x
    luma[2] = (np.arange(12)[:, None] - np.arange(20) % 7) / np.float32(20)  # diagonal, falling and rising
    expected = np.zeros((3, BINS, 2, 2))
    for i, picture in enumerate(luma.astype(np.float64)):
        padded = np.pad(picture, 1, mode="edge")
        gx, gy = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
        angle, energy = np.arctan2(gy, gx) * BINS / np.pi, np.hypot(gx, gy) / (6 * 10)
        low = np.floor(angle)
        for y, x in np.ndindex(12, 20):
            for step, share in ((0, 1 - (angle - low)[y, x]), (1, (angle - low)[y, x])):
                expected[i, int(low[y, x] + step) % BINS, y // 6, x // 10] += energy[y, x] * share
    np.testing.assert_allclose(_orientations(luma, 2, BINS), expected, atol=3e-5)
