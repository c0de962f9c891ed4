"""CleanCLIP and PAR: their losses, the trusted pairs they visit, and the poisoned model that PAR keeps."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.data.pairs import PairStore
from otcclip.defenses import PAR, CleanCLIP
from otcclip.defenses.base import HOLD_BACK, KEEP, EpochContext, PairBatch, TrainingPairs, training_pairs
from otcclip.defenses.losses import bounded_distance, clip_loss
from otcclip.models import TwoTower, create_two_tower

TRUSTED = (3, 8, 11, 20, 21)


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    store = make_store(32, 8, own_caption=True)
    return training_pairs(store, model, [store.keys[i] for i in TRUSTED])


@pytest.fixture(scope="module")
def batch(pairs: TrainingPairs) -> PairBatch:
    """Five pairs under four captions, two views of everything."""
    index = torch.tensor(TRUSTED)
    images = pairs.images[index].float() / 255
    tokens = pairs.tokens[:4]
    shorter = tokens.clone()
    shorter[:, 1:-1] = tokens[:, 2:]
    return PairBatch(index, (images, images.flip(-1)), tokens, torch.tensor([0, 1, 2, 3, 3]), (shorter,))


@pytest.mark.parametrize("member", [CleanCLIP, PAR])
def test_an_epoch_visits_trusted_pairs_alone_and_evenly(
    member: type[CleanCLIP] | type[PAR], model: TwoTower, pairs: TrainingPairs
) -> None:
    defense = member()
    plan = defense.begin_epoch(EpochContext(0, 4, 0, model, pairs))
    visits = Counter(plan.index.tolist())
    assert set(visits) == set(TRUSTED) and len(plan.index) == 32
    assert set(visits.values()) == {6, 7}
    assert torch.equal(plan.caption_of, pairs.caption_of) and plan.phase == "train"
    decided = defense.decisions(pairs)
    assert np.nonzero(decided.action == KEEP)[0].tolist() == list(TRUSTED)
    assert (decided.action == HOLD_BACK).sum() == 27 and np.isnan(decided.suspicion).all()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_cleanclip_is_clip_and_each_modality_with_itself(
    weight: float, model: TwoTower, pairs: TrainingPairs, batch: PairBatch
) -> None:
    defense = CleanCLIP(lambda_view=weight)
    plan = defense.begin_epoch(EpochContext(0, 4, 0, model, pairs))
    assert (plan.views, plan.text_views, plan.strong) == (2, 2, "further")
    with torch.no_grad():
        step = defense.step(batch, model)
        image, view = (model.image(images).pooled for images in batch.images)
        text, said = model.text(batch.tokens).pooled, model.text(batch.token_views[0]).pooled
        scale = model.logit_scale
    of_images = -torch.log_softmax(scale * image @ view.T, dim=1).diagonal().mean()
    of_texts = -torch.log_softmax(scale * text @ said.T, dim=1).diagonal().mean()
    clip = clip_loss(image, text, batch.caption, scale)
    torch.testing.assert_close(step.loss, clip + weight * (of_images + of_texts) / 2)
    torch.testing.assert_close(step.terms["clip"], clip)
    torch.testing.assert_close(step.terms["views"], (of_images + of_texts) / 2)


def test_a_second_visit_to_an_image_is_no_negative_of_the_first(model: TwoTower, batch: PairBatch) -> None:
    """The image term of a batch that holds one image twice: each visit among the four other images and itself."""
    twice = replace(batch, index=torch.tensor([*TRUSTED[:4], TRUSTED[0]]))
    with torch.no_grad():
        apart, step = CleanCLIP().step(batch, model), CleanCLIP().step(twice, model)
        image, view = (model.image(images).pooled for images in batch.images)
        cosine = model.logit_scale * image @ view.T
    cosine_twice = cosine.clone()
    cosine_twice[0, 4] = cosine_twice[4, 0] = -torch.inf
    by_images = [-torch.log_softmax(one, dim=1).diagonal().mean() / 2 for one in (cosine, cosine_twice)]
    torch.testing.assert_close(step.terms["views"] - apart.terms["views"], by_images[1] - by_images[0])


def shifted(model: TwoTower, amount: float) -> TwoTower:
    """The model after some training: every weight a little elsewhere."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(amount * p.std(unbiased=False) * torch.randn(p.shape, generator=generator))
    return other


def test_par_is_clip_less_half_the_distance_to_the_poisoned_model(
    model: TwoTower, pairs: TrainingPairs, batch: PairBatch
) -> None:
    defense, learner = PAR(), shifted(model, 0.3)
    defense.begin_epoch(EpochContext(0, 4, 0, model, pairs))
    defense.begin_epoch(EpochContext(1, 4, 0, learner, pairs))  # the model it started from stays the yardstick
    with torch.no_grad():
        step = defense.step(batch, learner)
        image, old_image = (m.image(batch.images[0]).pooled for m in (learner, model))
        text, old_text = (m.text(batch.tokens).pooled[batch.caption] for m in (learner, model))
        clip = clip_loss(image, learner.text(batch.tokens).pooled, batch.caption, learner.logit_scale)
    l_image, l_text = ((a - b).norm(dim=1).square().mean() for a, b in ((image, old_image), (text, old_text)))
    assert 0.01 < l_image < 2.15 and 0.01 < l_text < 2.15
    torch.testing.assert_close(step.loss, clip - (l_image + l_text) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.terms["image shift"], l_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.terms["caption shift"], l_text, atol=1e-5, rtol=1e-5)


def test_par_lets_go_beyond_tau(model: TwoTower, pairs: TrainingPairs, batch: PairBatch) -> None:
    defense, learner = PAR(tau=1e-3), shifted(model, 0.3)
    defense.begin_epoch(EpochContext(0, 4, 0, model, pairs))
    with torch.no_grad():
        step = defense.step(batch, learner)
    assert step.terms["image shift"] == 0 == step.terms["caption shift"] and step.loss == step.terms["clip"]


def test_the_poisoned_model_stands_still_and_survives_a_checkpoint(
    model: TwoTower, pairs: TrainingPairs, batch: PairBatch
) -> None:
    learner = copy.deepcopy(model)
    first = PAR()
    first.begin_epoch(EpochContext(0, 4, 0, learner, pairs))
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(1.1)
    learner.train()
    loss = first.step(batch, learner).loss
    loss.backward()
    assert first._poisoned is not None and not first._poisoned.training
    assert all(p.grad is None and not p.requires_grad for p in first._poisoned.parameters())
    second = PAR()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict().keys() == {"poisoned"}, "saved again before the first epoch after a resume"
    second.begin_epoch(EpochContext(1, 4, 0, learner, pairs))
    for name, value in model.state_dict().items():
        assert torch.equal(second.state_dict()["poisoned"][name], value)


def test_where_all_are_trusted_an_epoch_visits_each_once(model: TwoTower, pairs: TrainingPairs) -> None:
    everyone = TrainingPairs(
        pairs.keys, pairs.images, pairs.captions, pairs.tokens, pairs.caption_of, torch.ones(32, dtype=torch.bool)
    )
    plan = CleanCLIP().begin_epoch(EpochContext(0, 4, 0, model, everyone))
    assert sorted(plan.index.tolist()) == list(range(32))


def test_distance_of_unit_vectors_is_twice_one_less_cosine() -> None:
    a, b = (F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    torch.testing.assert_close(bounded_distance(a, b, 4.0), 2 - 2 * (a * b).sum(1).mean())
