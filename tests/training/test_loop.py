"""The loop: what a defence is handed, when, at which learning rate, and that a cut run ends as one never cut."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip import defenses
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
)
from otcclip.defenses.base import training_pairs as training_pairs_of
from otcclip.models import TwoTower, create_two_tower
from otcclip.training.augment import Augment
from otcclip.training.checkpoint import load_state, save_state
from otcclip.training.loop import TrainConfig, Trainer

STILL = Augment(shift=0.0, zoom=0.0, rotate=0.0, colour=0.0)
PLAIN = TrainConfig(epochs=2, batch_size=16, augment=STILL, warmup_augment=STILL, caption_crop=0.0)


class Recorder(Stateless):
    """A defence that writes down what it is handed; its loss is the temperature alone, so a step costs nothing."""

    name = "recorder"

    def __init__(self, warmup_epochs: int = 0, views: int = 1, scale: float = 1.0) -> None:
        self.warmup_epochs, self.views, self.scale = warmup_epochs, views, scale
        self.contexts: list[tuple[int, int, int, bool]] = []
        self.batches: list[list[PairBatch]] = []
        self.rates: list[list[float]] = []
        self.norms: list[float] = []
        self.trainer: Trainer | None = None
        self.index: Tensor | None = None
        self.caption_of: Tensor | None = None

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        self.contexts.append((context.epoch, context.epochs, context.seed, context.model.training))
        self.batches.append([])
        self.rates.append([])
        phase = "warm-up" if context.epoch < self.warmup_epochs else "train"
        index = torch.arange(len(context.pairs)) if self.index is None else self.index
        caption_of = context.pairs.caption_of if self.caption_of is None else self.caption_of
        return EpochPlan(phase, index, caption_of, self.views)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        assert model.training
        self.batches[-1].append(batch)
        if self.trainer is not None:
            self.rates[-1].append(self.trainer.optimizer.param_groups[0]["lr"])
            assert len({group["lr"] for group in self.trainer.optimizer.param_groups}) == 1
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if grads:  # of the step before, as the optimiser saw them
                self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        loss = model.clip.logit_scale * self.scale
        return Step(loss, {"twice": 2 * loss.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_all(pairs)


@pytest.fixture(scope="module")
def model() -> TwoTower:
    """For tests whose model need not start from anywhere in particular."""
    return create_two_tower("otcclip-tiny", seed=0)


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    """70 pictures of 7 things under 7 captions."""
    return training_pairs_of(make_store(70, 7), model)


def train(model: TwoTower, pairs: TrainingPairs, config: TrainConfig, defense: Recorder | None = None) -> Recorder:
    defense = defense or Recorder()
    defense.trainer = Trainer(model, defense, pairs, config)
    list(defense.trainer.epochs())
    return defense


def test_batches_hold_the_pairs_of_the_plan(model: TwoTower, pairs: TrainingPairs) -> None:
    seen = train(model, pairs, PLAIN)
    for epoch in seen.batches:
        assert len(epoch) == 70 // 16, "a last short batch is dropped"
        visited = torch.cat([batch.index for batch in epoch])
        assert len(visited) == len(set(visited.tolist())) == 64
        for batch in epoch:
            (images,) = batch.images
            torch.testing.assert_close(images, pairs.images[batch.index].float() / 255, atol=1e-5, rtol=0)
            assert len(batch.tokens.unique(dim=0)) == len(batch.tokens), "a caption stands once in a batch"
            assert torch.equal(batch.tokens[batch.caption], pairs.tokens[pairs.caption_of[batch.index]])
    assert not torch.equal(seen.batches[0][0].index, seen.batches[1][0].index), "every epoch has an order of its own"


def test_order_follows_the_seed(model: TwoTower, pairs: TrainingPairs) -> None:
    one, two, other = (train(model, pairs, replace(PLAIN, epochs=1, seed=s)).batches[0][0].index for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_captions_in_force_are_the_plans(model: TwoTower, pairs: TrainingPairs) -> None:
    """Also where an image learns without a caption, and where nobody in the batch has one."""
    defense = Recorder()
    defense.index = torch.tensor([3, 3, 8, 60, 61, 69])
    defense.caption_of = torch.full((70,), 5)
    defense.caption_of[60:62] = -1
    seen = train(model, pairs, replace(PLAIN, epochs=1), defense)
    ((batch,),) = seen.batches
    assert sorted(batch.index.tolist()) == [3, 3, 8, 60, 61, 69]
    expected = [-1 if i in (60, 61) else 0 for i in batch.index.tolist()]
    assert batch.caption.tolist() == expected and torch.equal(batch.tokens, pairs.tokens[[5]])

    defense.caption_of = torch.full((70,), -1)
    ((batch,),) = train(model, pairs, replace(PLAIN, epochs=1), defense).batches[-1:]
    assert batch.caption.tolist() == [-1] * 6 and len(batch.tokens) == 0


def test_views_are_augmented_apart_and_phases_by_their_own_map(model: TwoTower, pairs: TrainingPairs) -> None:
    config = replace(PLAIN, epochs=1, augment=Augment(), warmup_augment=STILL)
    warm_up, training = train(model, pairs, config, Recorder(warmup_epochs=1, views=2)).batches
    raw = pairs.images[warm_up[0].index].float() / 255
    for view in warm_up[0].images:
        torch.testing.assert_close(view, raw, atol=1e-5, rtol=0)
    one, two = training[0].images
    assert not torch.equal(one, two) and (one - two).abs().mean() < 0.3


def test_captions_are_cropped_by_the_given_share(model: TwoTower, make_store: Callable[..., PairStore]) -> None:
    pairs = training_pairs_of(make_store(64, 32, own_caption=True), model)
    words = {}
    for share in (0.0, 1.0):
        batches = train(model, pairs, replace(PLAIN, epochs=1, caption_crop=share)).batches[0]
        words[share] = np.mean([float((batch.tokens > 0).sum(1).float().mean()) for batch in batches])
    assert words[1.0] < 0.8 * words[0.0]


def test_a_small_plan_is_one_batch_and_an_empty_one_none(model: TwoTower, pairs: TrainingPairs) -> None:
    small = Recorder()
    small.index = torch.tensor([1, 2, 3])
    ((batch,),) = train(model, pairs, replace(PLAIN, epochs=1), small).batches
    assert sorted(batch.index.tolist()) == [1, 2, 3]
    small.index = torch.empty(0, dtype=torch.int64)
    trainer = Trainer(model, small, pairs, replace(PLAIN, epochs=1))
    (report,) = trainer.epochs()
    assert report.visited == 0 and math.isnan(report.loss)


def test_reports(model: TwoTower, pairs: TrainingPairs) -> None:
    with torch.no_grad():
        model.clip.logit_scale.fill_(1.0)
    defense = Recorder(warmup_epochs=1)
    trainer = Trainer(model, defense, pairs, replace(PLAIN, lr=1e-3))
    reports = list(trainer.epochs())
    assert [r.epoch for r in reports] == [0, 1, 2] and trainer.total_epochs == 3
    assert [r.phase for r in reports] == ["warm-up", "train", "train"]
    assert all(r.visited == 64 for r in reports), "a last short batch is dropped"
    assert reports[0].loss == pytest.approx(1.0, abs=0.01)
    assert all(r.terms == {"twice": pytest.approx(2 * r.loss, rel=1e-5)} for r in reports)
    assert 0 < reports[0].seconds < reports[1].seconds < reports[2].seconds == trainer.seconds
    assert [(c[0], c[1], c[2]) for c in defense.contexts] == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    assert not any(c[3] for c in defense.contexts), "a defence asks the model in evaluation mode"


def test_learning_rate(model: TwoTower, pairs: TrainingPairs) -> None:
    """Linear to the peak over the first quarter, then half a cosine to the end; warm-up epochs have their own."""
    config = replace(PLAIN, epochs=4, lr=0.01, warmup=0.25)
    rates = train(model, pairs, config, Recorder(warmup_epochs=2)).rates
    assert [len(epoch) for epoch in rates] == [4] * 6
    training = [rate / 0.01 for epoch in rates[2:] for rate in epoch]
    for step, rate in enumerate(training):
        t = step / 16
        if t < 0.25:
            assert rate == pytest.approx(min(1.0, 4 * t + 0.02))
        else:
            assert rate == pytest.approx(0.5 + 0.5 * math.cos(math.pi * (t - 0.25) / 0.75))
    assert training[0] == pytest.approx(0.02) and training[4] == 1.0 == max(training)
    assert training[10] == pytest.approx(0.5) and 0 < training[15] < 0.02
    warm_up = [rate / 0.01 for epoch in rates[:2] for rate in epoch]
    assert warm_up[0] == pytest.approx(0.02) and warm_up[2] == 1.0
    assert warm_up[5] == pytest.approx(0.5) and warm_up[7] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 5 / 6))


def test_optimiser_groups(model: TwoTower, pairs: TrainingPairs) -> None:
    """Matrices and kernels decay; gains, biases and the temperature do not. Every parameter is in one group."""
    trainer = Trainer(model, Recorder(), pairs, replace(PLAIN, weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(model.parameters())) == len(decay)
    assert trainer.optimizer.defaults["betas"] == (0.9, 0.98) and trainer.optimizer.defaults["eps"] == 1e-6
    words = trainer._words.weight  # stands for the whole table
    named = {n: words if n == "clip.token_embedding.weight" else p for n, p in model.named_parameters()}
    assert {name for name, p in named.items() if decay[id(p)] not in (0.0, 0.3)} == set()
    free = {name for name, p in named.items() if decay[id(p)] == 0.0}
    assert {"clip.logit_scale", "clip.ln_final.weight", "clip.visual.bn1.bias"} <= free
    assert not any(name.endswith(("conv1.weight", "proj.weight")) or "embedding" in name for name in free)


def test_gradients_are_clipped(model: TwoTower, pairs: TrainingPairs) -> None:
    norms = train(model, pairs, replace(PLAIN, epochs=1, grad_clip=0.25), Recorder(scale=50.0)).norms
    assert norms[-3:] == pytest.approx([0.25] * 3, rel=1e-3)


def test_precision(model: TwoTower, pairs: TrainingPairs) -> None:
    seen: list[bool] = []

    class Asking(Recorder):
        def step(self, batch: PairBatch, model: TwoTower) -> Step:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().step(batch, model)

    for precision in ("amp_bf16", "fp32"):
        train(model, pairs, replace(PLAIN, epochs=1, precision=precision), Asking())
    assert seen == [True] * 4 + [False] * 4


def test_the_global_generator_is_left_as_it_was(model: TwoTower, pairs: TrainingPairs) -> None:
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    train(model, pairs, replace(PLAIN, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


SMALL = {"alpha": 0.5, "first_refresh": 1, "refresh": 5, "unimodal_epochs": 1, "slow_epochs": 1}


def fresh(name: str, pairs: TrainingPairs, seed: int) -> Trainer:
    """A new run of a defence; options that make a small corpus enough, where it takes them."""
    takes = inspect.signature(defenses.DEFENSES[name]).parameters
    options = {option: value for option, value in SMALL.items() if option in takes}
    config = TrainConfig(epochs=3, batch_size=16, lr=2e-3, seed=4)
    return Trainer(create_two_tower("otcclip-tiny", seed=seed), defenses.make(name, **options), pairs, config)


@pytest.mark.parametrize("name", defenses.DEFENSES)
def test_a_resumed_run_ends_as_one_never_cut(
    name: str, model: TwoTower, make_store: Callable[..., PairStore], tmp_path: Path
) -> None:
    """Bit by bit: weights, running statistics, optimiser, decisions and losses, whatever else drew from the global
    generator and whatever weights the resuming process started from."""
    store = make_store(67, 16, own_caption=True)  # a prime: visits never come out even over the pairs in force
    captions = (*store.captions[:48], *store.captions[53:], *store.captions[48:53])  # the last nineteen are false
    vouched_for = torch.arange(67) < 40  # for the defences that fine-tune; the others never look
    pairs = replace(training_pairs_of(replace(store, captions=captions), model), trusted=vouched_for)
    torch.manual_seed(1)
    whole = fresh(name, pairs, 0)
    start = {k: v.clone() for k, v in whole.model.state_dict().items()}
    reports = list(whole.epochs())
    weights, one = whole.model.state_dict(), whole.optimizer.state_dict()["state"]
    assert not torch.equal(weights["clip.text_projection"], start["clip.text_projection"]), "nothing was learned"

    first = fresh(name, pairs, 0)
    for report in islice(first.epochs(), 2):
        save_state(tmp_path / f"{report.epoch}.pt", first.state_dict())
    for cut in (0, 1):
        torch.manual_seed(99 + cut)
        second = fresh(name, pairs, 1)
        second.load_state_dict(load_state(tmp_path / f"{cut}.pt"))
        rest = list(second.epochs())
        assert [r.epoch for r in rest] == [1, 2][cut:]
        assert [(r.loss, r.terms, r.visited) for r in rest] == [
            (r.loss, r.terms, r.visited) for r in reports[cut + 1 :]
        ]
        again, two = second.model.state_dict(), second.optimizer.state_dict()["state"]
        assert all(torch.equal(weights[k], again[k]) for k in weights)
        assert one.keys() == two.keys() and all(torch.equal(one[i][k], two[i][k]) for i in one for k in one[i])
        decided = (vars(run.defense.decisions(pairs)).values() for run in (whole, second))
        for mine, theirs in zip(*decided, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert second.seconds > 0
