"""Contrastive losses against open_clip's, closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from torch import Tensor

from otcclip.defenses.losses import clip_loss, view_loss


def unit(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_is_clips_loss_when_captions_are_distinct(scale: float) -> None:
    image, text = unit(9, 6, 0).requires_grad_(), unit(9, 6, 1).requires_grad_()
    caption = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    ours = clip_loss(image, text, caption, temperature)
    theirs = ClipLoss()(image, text[caption], temperature)
    torch.testing.assert_close(ours, theirs)
    inputs = (image, text, temperature)
    for one, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_one_caption_for_all_leaves_nothing_to_learn() -> None:
    image, text = unit(5, 4, 0).requires_grad_(), unit(1, 4, 1)
    loss = clip_loss(image, text, torch.zeros(5, dtype=torch.int64), torch.tensor(20.0))
    assert abs(float(loss.detach())) < 1e-12
    assert torch.autograd.grad(loss, image)[0].abs().max() < 1e-12


def test_two_images_of_one_caption_win_together() -> None:
    """Images e0, e1, e2 under captions 0, 0, 1 with texts e0, e2, worked out by hand."""
    basis, scale = torch.eye(3, dtype=torch.float64), 2.0
    e = math.exp(scale)
    to_text = (2 * -math.log(e / (e + 1)) + math.log(2)) / 3
    to_image = (2 * -math.log((e + 1) / (e + 2)) - math.log(e / (e + 2))) / 3
    loss = clip_loss(basis, basis[[0, 2]], torch.tensor([0, 0, 1]), torch.tensor(scale))
    assert float(loss) == pytest.approx((to_text + to_image) / 2, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_order_of_pairs_and_of_captions_does_not_matter(caption: list[int], shuffle: object) -> None:
    image, text, scale = unit(len(caption), 5, 0), unit(4, 5, 1), torch.tensor(7.0)
    pairs, names = list(range(len(caption))), list(range(4))
    shuffle.shuffle(pairs)  # type: ignore[attr-defined]
    shuffle.shuffle(names)  # type: ignore[attr-defined]
    moved = torch.tensor([names.index(caption[i]) for i in pairs])
    torch.testing.assert_close(
        clip_loss(image, text, torch.tensor(caption), scale), clip_loss(image[pairs], text[names], moved, scale)
    )


def test_view_loss_is_simclrs_equation() -> None:
    one, two, tau = unit(5, 4, 0), unit(5, 4, 1), 0.3
    both = torch.cat([one, two])
    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        others = [math.exp(float(both[i] @ both[k]) / tau) for k in range(10) if k != i]
        total += -math.log(math.exp(float(both[i] @ both[partner]) / tau) / sum(others))
    assert float(view_loss(one, two, tau)) == pytest.approx(total / 10, abs=1e-9)
