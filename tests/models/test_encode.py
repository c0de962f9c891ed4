"""Features of many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


def test_rows_are_those_images(model: TwoTower, pictures: Tensor) -> None:
    rows = torch.tensor([5, 0, 3])
    got, alone = encode_images(model, pictures, rows=rows), encode_images(model, pictures[rows])
    torch.testing.assert_close(got.pooled, alone.pooled)


def test_captions_in_batches_are_captions(model: TwoTower) -> None:
    tokens = model.tokenize([f"banana {'ice cream ' * (i % 5)}{i}" for i in range(BATCH + 3)])
    got = encode_captions(model, tokens)
    assert len(got.local) == BATCH + 3 and not got.pooled.requires_grad
    with torch.no_grad():
        alone = model.text(tokens[-3:])
    torch.testing.assert_close(got.pooled[-3:], alone.pooled, atol=0.03, rtol=0)
    assert torch.equal(got.local.sizes[-3:], alone.local.sizes)
