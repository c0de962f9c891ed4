"""Features of many, and the views a model is asked under."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from otcclip.evidence.views import JUDGING_VIEWS, low_band, without_window
from otcclip.models import TwoTower, create_two_tower
from otcclip.models.encode import BATCH, encode_captions, encode_images


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pictures(make_store) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.from_numpy(make_store(8, 8).images).permute(0, 3, 1, 2)


def test_images_in_batches_are_images(model: TwoTower, pictures: Tensor) -> None:
    many = pictures[torch.arange(BATCH + 5) % 8]
    got = encode_images(model, many)
    assert got.pooled.shape == (BATCH + 5, 128) and len(got.local) == BATCH + 5
    assert not got.pooled.requires_grad and not got.local.values.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = model.image(pictures.float() / 255)
    for start in (0, 248, BATCH):
        last = min(start + 8, BATCH + 5)
        rows = torch.arange(start, last)
        # bfloat16 convolutions of another batch size round otherwise.
        torch.testing.assert_close(got.pooled[rows], alone.pooled[rows % 8], atol=0.03, rtol=0)
        torch.testing.assert_close(got.local.take(rows).values, alone.local.take(rows % 8).values, atol=0.06, rtol=0)


def test_the_view_is_what_the_model_sees(model: TwoTower, pictures: Tensor) -> None:
    seen: list[Tensor] = []

    def view(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    got = encode_images(model, pictures, view)
    torch.testing.assert_close(seen[0], pictures.float() / 255)
    black = encode_images(model, torch.zeros_like(pictures))
    torch.testing.assert_close(got.pooled, black.pooled)


def test_captions_in_batches_are_captions(model: TwoTower) -> None:
    tokens = model.tokenize([f"banana {'ice cream ' * (i % 5)}{i}" for i in range(BATCH + 3)])
    got = encode_captions(model, tokens)
    assert len(got.local) == BATCH + 3 and not got.pooled.requires_grad
    with torch.no_grad():
        alone = model.text(tokens[-3:])
    torch.testing.assert_close(got.pooled[-3:], alone.pooled, atol=0.03, rtol=0)
    assert torch.equal(got.local.sizes[-3:], alone.local.sizes)


@pytest.mark.parametrize("view", [v for v in JUDGING_VIEWS if v is not None])
def test_views_keep_shape_range_and_their_input(view, pictures: Tensor) -> None:  # type: ignore[no-untyped-def]
    x = pictures.float() / 255
    before = x.clone()
    out = view(x)
    assert torch.equal(x, before)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    assert not torch.equal(out, x)


def test_a_window_is_painted_over_with_the_mean_colour(pictures: Tensor) -> None:
    x = pictures.float() / 255
    out = without_window(1, 2)(x)
    window = torch.zeros(64, 64, dtype=torch.bool)
    window[16:48, 32:64] = True
    assert torch.equal(out[..., ~window], x[..., ~window])
    torch.testing.assert_close(out[..., window], x.mean((-1, -2))[..., None].expand(-1, -1, 32 * 32))


def test_every_part_of_the_image_is_absent_from_some_view() -> None:
    """A patch anywhere is not there in at least one view: paint all black on white, see where grey appears."""
    ramp = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    changed = [(view(ramp) != ramp).all(1)[0] for view in JUDGING_VIEWS if view is not None and view is not low_band]
    assert torch.stack(changed).any(0).all()
    assert None in JUDGING_VIEWS and low_band in JUDGING_VIEWS


def test_low_band_has_no_fine_grain() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    torch.testing.assert_close(low_band(stripes), torch.full((1, 3, 64, 64), 0.5))
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(low_band(flat), flat)
