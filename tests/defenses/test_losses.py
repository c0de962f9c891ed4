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

from otcclip.defenses.base import PairBatch
from otcclip.defenses.clip import Clip
from otcclip.defenses.losses import bounded_distance, clip_loss, neighbour_loss, partner_loss, smoothed, view_loss
from otcclip.models import create_two_tower


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


def test_smoothing_is_of_what_an_image_is_called() -> None:
    """From image to text it is torch's label smoothing; from text to image every caption asks for its own image."""
    image, text, scale = unit(7, 6, 0), unit(7, 6, 1), torch.tensor(9.0)
    target, caption = torch.eye(7, dtype=torch.float64), torch.randperm(7, generator=torch.Generator().manual_seed(2))
    soft = smoothed(target, 0.3)
    assert soft.sum(dim=1).tolist() == pytest.approx([1.0] * 7) and smoothed(target, 0.0).equal(target)
    logits = scale * image @ text.T
    there = F.cross_entropy(logits, caption, label_smoothing=0.3)
    back = F.cross_entropy(logits[caption.argsort()].T, torch.arange(7))
    torch.testing.assert_close(clip_loss(image, text, caption, scale, soft), (there + back) / 2)


def test_undefended_clip_can_be_smoothed() -> None:
    """As `otcclip` is, to be compared; by default it is CLIP."""
    model = create_two_tower("otcclip-tiny", seed=0).eval()
    images, tokens = torch.rand(4, 3, 64, 64), model.tokenize(["a", "b c", "d", "e"])
    batch = PairBatch(torch.arange(4), (images,), tokens, torch.arange(4))
    with torch.no_grad():
        image, text = model.image(images).pooled, model.text(tokens).pooled
        hard = clip_loss(image, text, batch.caption, model.logit_scale)
        soft = clip_loss(image, text, batch.caption, model.logit_scale, smoothed(torch.eye(4), 0.5))
        torch.testing.assert_close(Clip().step(batch, model).loss, hard)
        torch.testing.assert_close(Clip(smoothing=0.5).step(batch, model).loss, soft)
    assert float(hard) != float(soft)


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


def test_a_target_that_only_the_own_caption_hits_is_none() -> None:
    image, text, scale = unit(7, 5, 0), unit(4, 5, 1), torch.tensor(7.0)
    caption = torch.tensor([0, 1, 1, 2, 3, 3, 3])
    hard = clip_loss(image, text, caption, scale)
    torch.testing.assert_close(clip_loss(image, text, caption, scale, torch.eye(4, dtype=torch.float64)), hard)


def test_a_soft_target_is_the_mean_over_what_it_says() -> None:
    image, text, scale = unit(6, 5, 0), unit(3, 5, 1), 7.0
    caption = [0, 1, 1, 2, 2, 2]
    target = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    weight = (scale * image @ text.T).exp()
    expected = 0.0
    for i, c in enumerate(caption):
        for other in range(3):
            to_text = weight[i, other] / weight[i].sum()
            to_image = weight[[j for j in range(6) if caption[j] == other], other].sum() / weight[:, other].sum()
            expected -= float(target[c, other] * (to_text.log() + to_image.log())) / 2 / 6
    ours = clip_loss(image, text, torch.tensor(caption), torch.tensor(scale), target)
    assert float(ours) == pytest.approx(expected, abs=1e-12)


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


def test_partner_loss_is_one_direction_of_clips() -> None:
    """Of the two cross-entropies in CLIP's loss it is the one over rows; both make the whole."""
    one, two, scale = unit(7, 5, 0), unit(7, 5, 1), torch.tensor(9.0, dtype=torch.float64)
    own = torch.arange(7)
    there, back = partner_loss(one, two, scale), partner_loss(two, one, scale)
    torch.testing.assert_close((there + back) / 2, clip_loss(one, two, own, scale))
    assert abs(float(there - back)) > 1e-3
    torch.testing.assert_close(there, F.cross_entropy(scale * one @ two.T, own))


def test_rows_of_one_image_are_no_negatives_of_each_other() -> None:
    """Each row's partner is looked for among the others' and its own, without what else comes from its image."""
    one, two, scale = unit(5, 4, 0), unit(5, 4, 1), torch.tensor(9.0, dtype=torch.float64)
    of = torch.tensor([3, 8, 3, 1, 3])
    total = 0.0
    for i in range(5):
        among = [k for k in range(5) if k == i or of[k] != of[i]]
        total += float(-torch.log_softmax(scale * one[i] @ two[among].T, dim=0)[among.index(i)]) / 5
    assert float(partner_loss(one, two, scale, of)) == pytest.approx(total, abs=1e-9)
    torch.testing.assert_close(partner_loss(one, two, scale, torch.arange(5)), partner_loss(one, two, scale))


def test_neighbour_loss_is_nnclrs_equation() -> None:
    one, two, pool, tau = unit(4, 3, 0), unit(4, 3, 1), unit(9, 3, 2), 0.2
    total = 0.0
    for query, key in ((one, two), (two, one)):
        for i in range(4):
            near = max(pool, key=lambda p, q=query[i]: float(p @ q))  # type: ignore[misc]
            share = math.exp(float(near @ key[i]) / tau) / sum(math.exp(float(near @ k) / tau) for k in key)
            total += -math.log(share) / 8
    near_one, near_two = (pool[(view @ pool.T).argmax(1)] for view in (one, two))
    assert float(neighbour_loss(one, two, near_one, near_two, tau)) == pytest.approx(total, abs=1e-9)


def test_neighbours_that_are_the_views_themselves_give_the_loss_between_views() -> None:
    one, two, tau = unit(6, 4, 0), unit(6, 4, 1), 0.3
    scale = torch.tensor(1 / tau, dtype=torch.float64)
    expected = (partner_loss(one, two, scale) + partner_loss(two, one, scale)) / 2
    torch.testing.assert_close(neighbour_loss(one, two, one, two, tau), expected)


@pytest.mark.parametrize(("cosine", "inside"), [(0.9, True), (0.0, True), (-0.07, True), (-0.08, False), (-1.0, False)])
def test_bounded_distance_rewards_up_to_tau(cosine: float, inside: bool) -> None:
    """||a - b||^2 = 2 - 2 cos: tau = 2.15 is a cosine of -.075. Inside, the gradient leads away; outside, nowhere."""
    then = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(3, 2)
    now = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64).repeat(3, 1).requires_grad_()
    reward = bounded_distance(now, then, 2.15)
    assert float(reward.detach()) == pytest.approx(2 - 2 * cosine if inside else 0.0)
    (gradient,) = torch.autograd.grad(-reward / 2, now)
    if inside:
        step = now.detach() - 0.01 * gradient  # one step down the loss
        assert (step @ then[0] < now.detach() @ then[0]).all(), "a step leads away from the poisoned features"
        torch.testing.assert_close(gradient, -(now.detach() - then) / 3)
    else:
        assert not gradient.any()


def test_bounded_distance_is_of_the_batch_not_of_each_pair() -> None:
    """The indicator asks the mean: one pair beyond tau goes on while the batch is within."""
    then = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    now = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert bounded_distance(now, then, 2.15) == 2.0 and bounded_distance(now, then, 1.99) == 0.0
