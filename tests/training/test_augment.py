"""Augmentation: ranges, seeds, and maps that can be told from their settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcclip.training.augment import MILD, STRONG, Augment, crop_captions, drop_words

STILL = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 6, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=seeded(1), dtype=torch.uint8)


@pytest.mark.parametrize("augment", [MILD, STRONG, Augment(grey=1.0, blur=1.0, flip=1.0, colour=1.0)])
def test_shape_range_and_seed(augment: Augment) -> None:
    given = pictures()
    before = given.clone()
    out = augment(given, seeded())
    assert torch.equal(given, before)
    assert out.shape == given.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1 and out.std() > 0.02
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, augment(given, seeded()))
    assert not torch.equal(out, augment(given, seeded(1)))


def test_one_generator_gives_another_view_each_time() -> None:
    generator = seeded()
    assert not torch.equal(MILD(pictures(), generator), MILD(pictures(), generator))


def test_the_global_generator_is_not_used() -> None:
    before = torch.get_rng_state()
    STRONG(pictures(), seeded())
    crop_captions(torch.tensor([[5, 1, 2, 9, 0]]), 0.5, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_without_ranges_it_only_scales_to_one() -> None:
    torch.testing.assert_close(STILL(pictures(), seeded()), pictures().float() / 255, atol=1e-5, rtol=0)


def test_images_of_a_batch_differ_in_their_maps() -> None:
    out = MILD(pictures(1).expand(8, -1, -1, -1), seeded())
    assert all(not torch.equal(out[0], other) for other in out[1:])


def test_mirror() -> None:
    out = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0, flip=1.0)(pictures(), seeded())
    torch.testing.assert_close(out, pictures().float().flip(-1) / 255, atol=1e-5, rtol=0)


def test_shift_is_a_share_of_the_side() -> None:
    """On a ramp a shift by a share of the side is a step by that share, along x and along y alike."""
    ramp = (torch.arange(64) * 4).to(torch.uint8)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64, dtype=torch.uint8)])
    shift = Augment(shift=0.1, zoom=0.0, rotate=0.0, colour=0.0)
    moved = shift(images.expand(200, -1, -1, -1), seeded())[:, :2, 20:44, 20:44] * 255 / 4 / 64
    still = STILL(images[None], seeded())[:, :2, 20:44, 20:44] * 255 / 4 / 64
    by = (moved - still).mean((-1, -2))
    assert by.abs().max() <= 0.1 + 1e-4
    assert (by.amax(0) > 0.08).all() and (by.amin(0) < -0.08).all()


def test_rotation_and_zoom_keep_the_centre() -> None:
    """A disc about the centre stays; a dot at the rim moves by at most the angle and the factor."""
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    disc = ((x**2 + y**2).sqrt() < 12).to(torch.uint8) * 255
    out = Augment(shift=0.0, zoom=0.1, rotate=0.3, colour=0.0)(disc.expand(50, 3, 64, 64), seeded())
    mass = out[:, 0].sum((1, 2))
    torch.testing.assert_close((out[:, 0] * x).sum((1, 2)) / mass, torch.zeros(50), atol=0.1, rtol=0)
    ratio = (mass / (disc > 0).sum()).sqrt()
    assert ratio.max() < 1.12 and ratio.min() > 0.88 and ratio.max() > 1.05 > 0.95 > ratio.min()


def test_grey_and_blur() -> None:
    grey = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0, grey=1.0)(pictures(), seeded())
    mean = (pictures().float() / 255).mean(1, keepdim=True).expand_as(grey)
    torch.testing.assert_close(grey, mean, atol=1e-5, rtol=0)
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(16).expand(40, 3, 32, 32)
    half = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0, blur=0.5)(stripes, seeded())
    flat = half.std((1, 2, 3)) < 0.01
    assert 8 < flat.sum() < 32


START, END = 50, 99


@st.composite
def captions(draw: st.DrawFn) -> Tensor:
    context = draw(st.integers(3, 14))
    rows = draw(st.lists(st.lists(st.integers(1, 49), max_size=context - 2), min_size=1, max_size=6))
    return torch.tensor([[START, *row, END, *[0] * (context - 2 - len(row))] for row in rows])


@settings(max_examples=60, deadline=None)
@given(captions(), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
def test_cropped_captions_are_captions(tokens: Tensor, seed: int, share: float) -> None:
    before = tokens.clone()
    out = crop_captions(tokens, share, seeded(seed))
    assert torch.equal(tokens, before) and out.shape == tokens.shape and out.dtype == tokens.dtype
    for whole, cut in zip(tokens.tolist(), out.tolist(), strict=True):
        end, last = whole.index(END), cut.index(END)
        assert cut[0] == START and cut[1:last] == whole[1:last], "a prefix is kept"
        assert not any(cut[last + 1 :]), "nothing stands behind the end token"
        assert min(2, end) <= last <= end, "at least one word where there was one"
    if share == 0:
        assert torch.equal(out, tokens)


def test_crops_are_uniform_over_words() -> None:
    """Of one long caption, at share 1, every number of words from one to all is as likely; at share .5 half stay."""
    caption = torch.tensor([[START, *range(1, 9), END, 0]]).expand(4000, -1)
    words = (crop_captions(caption, 1.0, seeded()) == END).int().argmax(1) - 1
    counts = torch.bincount(words, minlength=9)
    assert counts[0] == 0 and counts[1:].min() > 400 and counts[1:].max() < 600
    whole = (crop_captions(caption, 0.5, seeded()) == caption).all(1).float().mean()
    assert abs(float(whole) - (0.5 + 0.5 / 8)) < 0.03


@settings(max_examples=60, deadline=None)
@given(captions(), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
def test_captions_that_lose_words_are_captions(tokens: Tensor, seed: int, share: float) -> None:
    before = tokens.clone()
    out = drop_words(tokens, share, seeded(seed))
    assert torch.equal(tokens, before) and out.shape == tokens.shape and out.dtype == tokens.dtype
    for whole, left in zip(tokens.tolist(), out.tolist(), strict=True):
        words, rest = whole[1 : whole.index(END)], left[1 : left.index(END)]
        assert left[0] == START and not any(left[left.index(END) + 1 :])
        remaining = iter(words)
        assert all(word in remaining for word in rest), "what is left stands in its order"
        assert len(rest) == len(words) if share == 0 else bool(rest) is bool(words)
        assert share < 1 or len(rest) == min(1, len(words))


def test_words_are_dropped_by_the_given_share() -> None:
    caption = torch.tensor([[START, *range(1, 11), END, 0]]).expand(4000, -1)
    out = drop_words(caption, 0.3, seeded())
    there = torch.stack([(out == word).any(1).float().mean() for word in range(1, 11)])
    assert (there - 0.7).abs().max() < 0.03, "each word alike"
