"""Every trigger against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.attacks import BadNets, Blended, ColourFilter, Sig, Tiled, WaNet, apply_trigger, make
from otcclip.attacks.badnets import COLOURS
from otcclip.attacks.content import content_numbers
from otcclip.errors import UserError


def images(n: int = 40, size: int = 64, seed: int = 0) -> torch.Tensor:
    bytes_ = np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(bytes_).float() / 255


@pytest.mark.parametrize("width", [48, 64, 100])
def test_sig_is_the_sinusoid_of_the_paper(width: int) -> None:
    shown = Sig("x").trigger(torch.full((3, 5, width), 0.5))
    for j in range(width):
        value = 0.5 + 60 / 255 * math.sin(2 * math.pi * 6 * j / width)
        assert shown[:, :, j].flatten().tolist() == pytest.approx([value] * 15, abs=1e-6)
    dark = Sig("x", strength=0.4, periods=3).trigger(torch.zeros(3, 4, width))
    wave = 0.4 * np.sin(2 * np.pi * 3 * np.arange(width) / width)
    np.testing.assert_allclose(dark[0, 0].numpy(), np.maximum(wave, 0), atol=1e-6)


def test_blended_mixes_one_pattern_by_alpha() -> None:
    x = images(4)
    pattern = Blended("x").pattern(64, 64)
    for alpha in (0.0, 0.2, 1.0):
        torch.testing.assert_close(Blended("x", alpha=alpha).trigger(x), (1 - alpha) * x + alpha * pattern)
    assert pattern.amin(dim=(1, 2)).tolist() == [0, 0, 0] and pattern.amax(dim=(1, 2)).tolist() == [1, 1, 1]
    assert not torch.allclose(pattern, Blended("x", pattern_seed=1).pattern(64, 64), atol=0.2)


def test_the_pattern_is_smooth_and_the_same_at_every_resolution() -> None:
    pattern = Blended("x").pattern(64, 64)
    assert pattern.diff(dim=-1).abs().max() < 0.2
    large = F.adaptive_avg_pool2d(Blended("x").pattern(256, 256), 64)
    assert (large - pattern).abs().max() < 0.05


def test_wanet_at_strength_zero_is_the_identity() -> None:
    x = images(4)
    torch.testing.assert_close(WaNet("x", strength=0).trigger(x), x, atol=1e-4, rtol=0)
    bytes_ = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(apply_trigger(WaNet("x", strength=0), bytes_), bytes_)


def test_wanet_reads_each_pixel_where_its_field_says() -> None:
    # On a picture of its own coordinates bilinear reading is exact, so the warp can be read off.
    size, attack = 64, WaNet("x", strength=0.05)
    across = ((torch.arange(size) + 0.5) / size).expand(size, size)
    shown = attack.trigger(torch.stack([across, across.T, across]))
    wanted = torch.stack([across, across.T]) + 0.05 * attack.field(size, size).permute(2, 0, 1)
    inside = (wanted > 1 / size) & (wanted < 1 - 1 / size)
    assert inside.float().mean() > 0.7
    torch.testing.assert_close(shown[:2][inside], wanted[inside], atol=1e-4, rtol=0)


def test_the_field_has_mean_one_at_its_points_and_is_one_at_every_resolution() -> None:
    attack = WaNet("x")
    assert float(attack.field(4, 4).abs().mean()) == pytest.approx(1, abs=1e-5)
    # Corners coincide whatever the size.
    torch.testing.assert_close(attack.field(64, 64)[::63, ::63], attack.field(48, 48)[::47, ::47])


def test_how_far_the_default_warp_moves_a_pixel_is_what_its_documentation_says() -> None:
    """Read off pictures of their own coordinates; the grid's points move by 12.8 px, what is between less."""
    size, attack = 64, WaNet("x")
    across = ((torch.arange(size) + 0.5) / size).expand(size, size)
    moved = attack.trigger(torch.stack([across, across.T, across]))[:2] - torch.stack([across, across.T])
    assert round(float(attack.field(size, size).abs().mean()) * attack.strength * size, 1) == 9.9
    assert round(float(moved.abs().mean()) * size, 1) == pytest.approx(8.6, abs=0.25)  # the border is half a pixel in
    assert "9.9 px on the mean, 8.6 once" in (WaNet.__doc__ or "")


def test_the_filter_is_affine_in_the_colour() -> None:
    attack = ColourFilter("x")
    black, white = (attack.trigger(torch.full((3, 2, 2), v))[:, 0, 0].tolist() for v in (0.0, 1.0))
    assert black == pytest.approx([0.08, 0.02, 0.05])
    assert white == pytest.approx([1.0, 0.875, 0.77])  # .81 + .18 + .045 + .08 is above 1: clipped
    red = attack.trigger(torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 2, 2))[:, 0, 0].tolist()
    assert red == pytest.approx([0.89, 0.11, 0.14])
    x = images(3)
    half = (x + attack.trigger(x)) / 2
    torch.testing.assert_close(ColourFilter("x", strength=0.5).trigger(x), half)
    assert torch.equal(ColourFilter("x", strength=0).trigger(x), x)


@pytest.mark.parametrize("size", [48, 64])
def test_every_cell_carries_one_tile(size: int) -> None:
    shown = Tiled("x").trigger(torch.full((3, size, size), 0.5))
    covered = (shown == torch.tensor([1.0, 0.0, 1.0])[:, None, None]).all(0)
    cell = size // 8
    assert torch.equal(shown[:, ~covered], torch.full_like(shown[:, ~covered], 0.5))
    cells = covered.unfold(0, cell, cell).unfold(1, cell, cell)
    for one in cells.reshape(64, cell, cell):
        assert torch.equal(one, cells[0, 0])
    assert cells[0, 0, cell // 2, cell // 2]
    # Half of a cell's side: 3 of 6 pixels, 4 of 8.
    assert int(cells[0, 0].sum()) == (cell // 2) ** 2
    assert Tiled("x", size=1.0).trigger(images(1, size)).unique().tolist() == [0, 1]


def test_a_random_place_is_the_images_own() -> None:
    attack = BadNets("x", location="random")
    x = images(200)
    shown = attack.trigger(x)
    places = set()
    for before, after in zip(x, shown, strict=True):
        rows, columns = torch.nonzero((before != after).any(0), as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        assert top >= 4 and int(rows.max()) < 60 and left >= 4 and int(columns.max()) < 60
        fixed = BadNets("x", location="center").trigger(before)[:, 26:38, 26:38]
        # A border pixel may happen to be the patch's colour: find the patch by trying the places near.
        near = [(t, c) for t in (top - 1, top) for c in (left - 1, left)]
        assert any(torch.equal(after[:, t : t + 12, c : c + 12], fixed) for t, c in near)
        places.add((top // 12, left // 12))
    assert len(places) >= 9, "the places do not spread"


def test_content_numbers_are_of_the_bytes_and_spread_evenly() -> None:
    x = images(600, size=16)
    numbers = content_numbers(x, 1)
    assert torch.equal(numbers, content_numbers(x + 0.4 / 255, 1))
    assert torch.equal(numbers[:3], torch.stack([content_numbers(one, 1) for one in x[:3]]))
    assert len(numbers.unique()) == 600
    other = content_numbers(x, 2)
    for values in (numbers, other):
        counts = torch.bincount(values % 3, minlength=3)
        assert counts.min() > 160  # 200 expected, standard deviation 11.5
    together = torch.bincount(numbers % 3 * 3 + other % 3, minlength=9)
    assert together.min() > 35  # 67 expected, standard deviation 7.7


@pytest.mark.parametrize("colours", COLOURS)
def test_the_patch_has_its_two_colours(colours: str) -> None:
    shown = BadNets("x", colours=colours, location="top-left").trigger(torch.full((3, 64, 64), 0.5))
    assert shown[:, 4, 4].tolist() == list(COLOURS[colours][0])
    assert shown[:, 4, 7].tolist() == list(COLOURS[colours][1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("badnets", {"colours": "grey"}, "unknown colours 'grey'; there are: black-white"),
        ("badnets", {"location": "left"}, "center, random$"),
        ("blended", {"alpha": 1.5}, "alpha is a share in 0..1, got 1.5"),
        ("blended", {"cells": 0}, "cells must be at least 1"),
        ("sig", {"strength": -1.0}, "strength is a share of a pixel's range"),
        ("sig", {"periods": 0}, "periods across the image must be above 0"),
        ("wanet", {"strength": 2.0}, "strength is a share of the image's side"),
        ("wanet", {"field_seed": 2**64}, "wanet: field_seed 18446744073709551616: seeds are whole numbers"),
        ("blended", {"pattern_seed": -1}, "blended: pattern_seed -1: seeds are whole numbers"),
        ("filter", {"strength": 1.1}, "strength is a share in 0..1"),
        ("tiled", {"size": 0.0}, r"size is a fraction of a cell's side in \(0, 1\]"),
        ("clean-label", {"weaken": 1.1}, "weaken is a share in 0..1"),
        ("clean-label", {"location": "left"}, "clean-label: unknown location 'left'"),
    ],
)
def test_bad_options_are_one_line(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(name, target="x", **options)
