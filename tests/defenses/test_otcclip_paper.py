"""The plain reading: every K-th epoch, every image under its nearest caption."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from otcclip.data.pairs import PairStore
from otcclip.defenses import OTCClipPaper
from otcclip.defenses.base import KEEP, REPAIR, EpochContext, EpochPlan, PairBatch, TrainingPairs, training_pairs
from otcclip.evidence.matching import EPSILON, ITERATIONS
from otcclip.models import TwoTower, create_two_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.transport import all_costs


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    return training_pairs(make_store(40, 20), model)


def ask(defense: OTCClipPaper, epoch: int, model: TwoTower, pairs: TrainingPairs) -> EpochPlan:
    torch.manual_seed(epoch)
    return defense.begin_epoch(EpochContext(epoch, 6, 0, model, pairs))


@pytest.mark.parametrize("every", [1, 3])
def test_matches_in_every_kth_epoch(every: int, model: TwoTower, pairs: TrainingPairs) -> None:
    """The match is the nearest caption by d over the whole pool; between, pairs train as they stand."""
    image, text = encode_images(model, pairs.images), encode_captions(model, pairs.tokens)
    local = all_costs(image.local, text.local, epsilon=EPSILON, iterations=ITERATIONS).value
    d = 0.5 * (1 - image.pooled @ text.pooled.T) + 0.5 * local
    defense = OTCClipPaper(every=every)
    for epoch in range(6):
        plan = ask(defense, epoch, model, pairs)
        decided = defense.decisions(pairs)
        assert plan.views == 2 and plan.index.tolist() == list(range(40))
        if epoch % every == every - 1:
            chosen = d.gather(1, plan.caption_of[:, None])[:, 0]
            torch.testing.assert_close(chosen, d.amin(1), atol=1e-5, rtol=0)
            changed = (plan.caption_of != pairs.caption_of).numpy()
            assert changed.any()
            assert (decided.action == np.where(changed, REPAIR, KEEP)).all()
        else:
            assert torch.equal(plan.caption_of, pairs.caption_of) and (decided.action == KEEP).all()
        assert (decided.caption_of == plan.caption_of.numpy()).all()


def test_a_pool_is_drawn_anew_for_each_matching(model: TwoTower, pairs: TrainingPairs) -> None:
    defense = OTCClipPaper(every=1, pool=0.1)
    used = [set(ask(defense, epoch, model, pairs).caption_of.tolist()) for epoch in range(8)]
    assert all(len(captions) <= 2 for captions in used), "two of twenty captions are the pool"
    assert len(set().union(*used)) > 2


def test_the_loss_is_the_sum_of_its_terms(model: TwoTower, pairs: TrainingPairs) -> None:
    defense = OTCClipPaper(lambda_cross=0.3, lambda_view=0.7)
    images = pairs.images[:4].float() / 255
    batch = PairBatch(torch.arange(4), (images, images.flip(-1)), pairs.tokens[:3], torch.tensor([0, 1, 2, 2]))
    learner = create_two_tower("otcclip-tiny", seed=0)
    step = defense.step(batch, learner)
    assert set(step.terms) == {"clip", "ot", "views"}
    total = step.terms["clip"] + 0.3 * step.terms["ot"] + 0.7 * step.terms["views"]
    torch.testing.assert_close(step.loss.detach(), total)
    step.loss.backward()
    assert learner.local_head is not None and learner.local_head.weight.grad is not None
    with torch.no_grad():
        same = defense.step(PairBatch(batch.index, (images, images), batch.tokens, batch.caption), model)
        other = defense.step(batch, model)
    assert same.terms["clip"] == other.terms["clip"] and same.terms["views"] < other.terms["views"]
