"""What a plan may ask of the loop: views of captions, strong views, a slower rate, pairs whose parts learn apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from otcclip.data.pairs import PairStore
from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Stateless,
    Step,
    TrainingPairs,
    keep_all,
    training_pairs,
)
from otcclip.models import TwoTower, create_two_tower
from otcclip.training.augment import Augment
from otcclip.training.loop import TrainConfig, Trainer

STILL = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0)
GREY = replace(STILL, grey=1.0)


class Planned(Stateless):
    """A defence that asks for one plan over and over and keeps what it is handed; a step costs nothing."""

    name = "planned"
    warmup_epochs = 0

    def __init__(self, **asks: Any) -> None:
        self.asks, self.batches, self.rates = asks, list[PairBatch](), list[float]()
        self.trainer: Trainer | None = None

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        return EpochPlan("train", torch.arange(len(context.pairs)), context.pairs.caption_of, **self.asks)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        assert self.trainer is not None
        self.batches.append(batch)
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])
        return Step(model.clip.logit_scale * 1.0)

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_all(pairs)


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0)


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    return training_pairs(make_store(64, 32, own_caption=True), model)


def train(model: TwoTower, pairs: TrainingPairs, **asks: Any) -> Planned:
    config = TrainConfig(
        epochs=1, batch_size=16, augment=STILL, warmup_augment=GREY, caption_crop=0.0, word_drop=0.5, warmup=0.25
    )
    defense = Planned(**asks)
    defense.trainer = Trainer(model, defense, pairs, config)
    list(defense.trainer.epochs())
    return defense


@pytest.mark.parametrize(("strong", "views"), [("none", [0, 0]), ("further", [0, 1]), ("all", [1, 1])])
def test_strong_views(strong: str, views: list[int], model: TwoTower, pairs: TrainingPairs) -> None:
    """Of images and captions alike: none, those beyond the first, all."""
    batches = train(model, pairs, views=2, text_views=2, strong=strong).batches
    assert len(batches) == 4
    for batch in batches:
        for images, is_strong in zip(batch.images, views, strict=True):
            assert bool((images.std(dim=1) < 1e-5).all()) is bool(is_strong), "grey is the strong map here"
        (further,) = batch.token_views
        own = pairs.tokens[pairs.caption_of[batch.index]]
        for tokens, is_strong in zip((batch.tokens, further), views, strict=True):
            assert tokens.shape == batch.tokens.shape
            words = (tokens[batch.caption] > 0).sum().item()
            assert (words < 0.85 * (own > 0).sum().item()) if is_strong else torch.equal(tokens[batch.caption], own)


def test_a_plan_asks_for_nothing_of_the_kind_by_itself(model: TwoTower, pairs: TrainingPairs) -> None:
    for batch in train(model, pairs).batches:
        assert batch.token_views == () and batch.apart is None and len(batch.images) == 1
        assert torch.equal(batch.tokens[batch.caption], pairs.tokens[pairs.caption_of[batch.index]])


def test_slower(model: TwoTower, pairs: TrainingPairs) -> None:
    usual, slow = train(model, pairs).rates, train(model, pairs, lr_scale=0.01).rates
    assert slow == pytest.approx([rate / 100 for rate in usual]) and max(usual) > 1e-4


def test_apart_follows_its_pairs(model: TwoTower, pairs: TrainingPairs) -> None:
    apart = torch.arange(64) % 3 == 0
    batches = train(model, pairs, apart=apart).batches
    assert all(batch.apart is not None and torch.equal(batch.apart, apart[batch.index]) for batch in batches)
    assert 0 < sum(int(batch.apart.sum()) for batch in batches if batch.apart is not None) == int(apart.sum())
