"""The contract of every defence: those in the registry and a toy defined here pass the same tests."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from otcclip import defenses, registry
from otcclip.data.pairs import PairStore
from otcclip.defenses import DEFENSES, Defense
from otcclip.defenses.base import (
    HOLD_BACK,
    KEEP,
    REPAIR,
    Decisions,
    EpochContext,
    EpochPlan,
    FineTuner,
    PairBatch,
    Step,
    TrainingPairs,
    training_pairs,
)
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower

EPOCHS = 7  # safeclip trains on safe pairs from the seventh on


class Toy:
    """Distrusts one more pair every epoch, in an order of its own: a newcomer's one file."""

    name = "toy"
    warmup_epochs = 0

    def __init__(self) -> None:
        self._order, self._out = torch.empty(0, dtype=torch.int64), 0

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        if not len(self._order):
            self._order = torch.randperm(len(context.pairs))
        self._out += 1
        return EpochPlan("train", self._order[self._out :], context.pairs.caption_of)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, text = model.image(batch.images[0]), model.text(batch.tokens)
        loss = -(image.pooled * text.pooled[batch.caption]).sum(1).mean() * model.logit_scale
        return Step(loss, {"pull": loss.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        action = np.full(len(pairs), KEEP, np.int8)
        action[self._order[: self._out].numpy()] = HOLD_BACK
        return Decisions(action, pairs.caption_of.numpy(), (action == HOLD_BACK).astype(np.float64))

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order, "out": self._out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._order, self._out = state["order"], int(state["out"])


FAMILY: Mapping[str, type[Defense]] = registry.registry("defence", (*DEFENSES.values(), Toy))


@dataclass(frozen=True)
class Run:
    """A defence asked for its plans, epoch after epoch, by a model that doesn't learn; one step in each epoch.

    `grads`: the parameters of an epoch's step that got a gradient, and the largest entry of each.
    """

    defense: Defense
    plans: tuple[EpochPlan, ...]
    decisions: tuple[Decisions, ...]
    steps: tuple[Step, ...]
    grads: tuple[dict[str, float], ...]


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    """256 pictures of 32 things, every caption once; look-alikes can tell a fitting caption from the rest.

    Somebody vouches for 64 of them.
    """
    store = make_store(256, 32, own_caption=True).without_labels()
    return training_pairs(store, model, store.keys[::4])


def ask(defense: Defense, epoch: int, model: TwoTower, pairs: TrainingPairs) -> EpochPlan:
    torch.manual_seed(epoch)  # as the loop does
    return defense.begin_epoch(EpochContext(epoch, EPOCHS + defense.warmup_epochs, 0, model, pairs))


@pytest.fixture(scope="module", params=FAMILY)
def run(request: pytest.FixtureRequest, model: TwoTower, pairs: TrainingPairs) -> Run:
    defense = registry.make("defence", FAMILY, request.param)
    plans, decisions, steps, grads = [], [], [], []
    for epoch in range(EPOCHS + defense.warmup_epochs):
        plans.append(copy.deepcopy(ask(defense, epoch, model, pairs)))
        decisions.append(copy.deepcopy(defense.decisions(pairs)))
        learner = copy.deepcopy(model).train()
        step = defense.step(batch_of(plans[-1], pairs, 12), learner)
        step.loss.backward()
        found = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
        grads.append({name: float(grad.abs().max()) for name, grad in found.items()})
        steps.append(Step(step.loss.detach(), step.terms))
    return Run(defense, *map(tuple, (plans, decisions, steps, grads)))


def batch_of(plan: EpochPlan, pairs: TrainingPairs, size: int = 24) -> PairBatch:
    """The first pairs of a plan as the loop hands them to `step`, not augmented."""
    index = plan.index[:size]
    images = pairs.images[index].float() / 255
    caption_of = plan.caption_of[index]
    unique = caption_of[caption_of >= 0].unique()
    caption = torch.where(caption_of >= 0, torch.searchsorted(unique, caption_of), -1)
    apart = None if plan.apart is None else plan.apart[index]
    tokens = pairs.tokens[unique]
    return PairBatch(index, (images,) * plan.views, tokens, caption, (tokens,) * (plan.text_views - 1), apart)


def test_is_a_defence(run: Run) -> None:
    assert run.defense.name in FAMILY
    assert isinstance(run.defense.warmup_epochs, int) and run.defense.warmup_epochs >= 0
    assert all(hasattr(run.defense, name) for name in Defense.__annotations__)


def test_plans_name_pairs_and_captions_that_exist(run: Run, pairs: TrainingPairs) -> None:
    n, u = len(pairs), len(pairs.captions)
    for epoch, plan in enumerate(run.plans):
        assert plan.phase == ("warm-up" if epoch < run.defense.warmup_epochs else "train")
        assert plan.views in (1, 2) and plan.text_views in (1, 2) and plan.strong in ("none", "further", "all")
        assert 0 < plan.lr_scale <= 1
        assert plan.index.dtype == plan.caption_of.dtype == torch.int64
        assert plan.index.ndim == 1 and len(plan.index) and plan.caption_of.shape == (n,)
        assert plan.index.min() >= 0 and plan.index.max() < n
        visited = plan.caption_of[plan.index]
        assert visited.min() >= -1 and visited.max() < u


def test_decisions_are_one_a_pair(run: Run, pairs: TrainingPairs) -> None:
    n = len(pairs)
    for decisions in (registry.make("defence", FAMILY, run.defense.name).decisions(pairs), *run.decisions):
        assert decisions.action.shape == decisions.caption_of.shape == decisions.suspicion.shape == (n,)
        assert decisions.action.dtype == np.int8 and decisions.suspicion.dtype == np.float64
        assert set(decisions.action.tolist()) <= {KEEP, REPAIR, HOLD_BACK}
        assert decisions.caption_of.min() >= 0 and decisions.caption_of.max() < len(pairs.captions)


def test_what_is_trained_on_is_what_was_decided(run: Run, pairs: TrainingPairs) -> None:
    """A pair kept learns under its own caption, one re-paired under the new one, one held back under none or apart."""
    own = pairs.caption_of.numpy()
    for plan, decisions in zip(run.plans, run.decisions, strict=True):
        assert (decisions.caption_of[decisions.action == KEEP] == own[decisions.action == KEEP]).all()
        if plan.phase == "warm-up":
            continue
        for i, caption in zip(plan.index.tolist(), plan.caption_of[plan.index].tolist(), strict=True):
            if plan.apart is not None and plan.apart[i]:
                assert decisions.action[i] == HOLD_BACK
            elif caption >= 0:
                assert decisions.action[i] != HOLD_BACK and caption == decisions.caption_of[i]


def test_step_gives_a_loss_with_gradient(run: Run, model: TwoTower) -> None:
    """In every epoch; over a run every parameter of open_clip's model learns, and every tower in its first epochs."""
    for plan, step, grads in zip(run.plans, run.steps, run.grads, strict=True):
        assert step.loss.shape == () and torch.isfinite(step.loss)
        assert step.terms and all(isinstance(name, str) for name in step.terms)
        for term in step.terms.values():
            assert term.shape == () and torch.isfinite(term) and not term.requires_grad
        assert grads and all(np.isfinite(largest) for largest in grads.values()), plan.phase
    ever = set().union(*run.grads)
    assert not [name for name, _ in model.named_parameters() if name.startswith("clip.") and name not in ever]
    # Later a match by a model that never learned may give one caption to all, and nothing to tell apart.
    first_clip = next(i for i, grads in enumerate(run.grads) if grads.get("clip.logit_scale"))
    for tower in ("clip.visual", "clip.transformer", "clip.token_embedding"):
        assert any(largest > 0 for name, largest in run.grads[first_clip].items() if name.startswith(tower)), (
            f"{tower} does not learn"
        )
    assert any(largest > 0 for name, largest in run.grads[0].items() if name.startswith("clip.visual"))


def test_step_leaves_its_batch_alone(run: Run, model: TwoTower, pairs: TrainingPairs) -> None:
    batch = batch_of(run.plans[-1], pairs)
    before = copy.deepcopy(batch)
    run.defense.step(batch, model)
    for field in ("index", "tokens", "caption"):
        assert torch.equal(getattr(batch, field), getattr(before, field))
    assert all(torch.equal(one, other) for one, other in zip(batch.images, before.images, strict=True))


def plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(plain(inner) for inner in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", [1, EPOCHS - 1])
@pytest.mark.parametrize("name", FAMILY)
def test_a_restored_defence_goes_on_as_the_first(name: str, cut: int, model: TwoTower, pairs: TrainingPairs) -> None:
    """State survives `torch.load(weights_only=True)`; plans and steps after it are those of the run never cut."""
    first = registry.make("defence", FAMILY, name)
    for epoch in range(cut):
        ask(first, epoch, model, pairs)
    assert plain(first.state_dict())
    second = registry.make("defence", FAMILY, name)
    second.load_state_dict(through_a_file(first.state_dict()))
    one, other = ask(first, cut, model, pairs), ask(second, cut, model, pairs)
    assert (one.phase, one.views) == (other.phase, other.views)
    assert torch.equal(one.index, other.index) and torch.equal(one.caption_of, other.caption_of)
    batch = batch_of(one, pairs)
    with torch.no_grad():
        torch.testing.assert_close(first.step(batch, model).loss, second.step(batch, model).loss, rtol=0, atol=0)
    for field in fields(Decisions):
        mine, theirs = (getattr(d.decisions(pairs), field.name) for d in (first, second))
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", FAMILY)
def test_a_restored_defence_goes_on_within_an_epoch(name: str, model: TwoTower, pairs: TrainingPairs) -> None:
    """A checkpoint between two steps: the next one follows without another `begin_epoch`."""
    first, second = (registry.make("defence", FAMILY, name) for _ in range(2))
    for epoch in range(2):
        plan = ask(first, epoch, model, pairs)
    with torch.no_grad():
        first.step(batch_of(plan, pairs, 8), model)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert plain(second.state_dict())
        batch = batch_of(replace(plan, index=plan.index.flip(0)), pairs, 8)
        torch.testing.assert_close(first.step(batch, model).loss, second.step(batch, model).loss, rtol=0, atol=0)
    for field in fields(Decisions):
        mine, theirs = (getattr(d.decisions(pairs), field.name) for d in (first, second))
        np.testing.assert_array_equal(mine, theirs)


def test_a_defence_sees_no_label(make_store: Callable[..., PairStore], model: TwoTower) -> None:
    store = make_store(12, 4)
    seen = training_pairs(store, model)
    assert {field.name for field in fields(seen)} == {
        "keys",
        "images",
        "captions",
        "tokens",
        "caption_of",
        "trusted",
    }
    assert seen.trusted is None
    assert seen.captions == tuple(sorted(set(store.captions))) and len(seen.tokens) == len(seen.captions)
    assert [seen.captions[i] for i in seen.caption_of] == list(store.captions)
    assert torch.equal(seen.tokens, model.tokenize(seen.captions))
    assert seen.images.shape == (12, 3, 64, 64) and seen.images.dtype == torch.uint8
    assert np.array_equal(seen.images.permute(0, 2, 3, 1).numpy(), store.images)
    unlabelled = training_pairs(store.without_labels(), model)
    assert unlabelled.keys == seen.keys and torch.equal(unlabelled.caption_of, seen.caption_of)


def test_unknown_defence_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"unknown defence 'otclip'; did you mean 'otcclip'.*there are: clip, otcclip-p"
    ):
        defenses.make("otclip")


@pytest.mark.parametrize("name", DEFENSES)
def test_unknown_option_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"defence '{name}': .*'colour'"):
        defenses.make(name, colour="red")


@pytest.mark.parametrize("name", DEFENSES)
def test_made_by_name(name: str) -> None:
    made = defenses.make(name)
    assert type(made) is DEFENSES[name] and made.name == name
    for option in inspect.signature(DEFENSES[name]).parameters.values():
        assert option.default is not inspect.Parameter.empty, "a defence runs with its defaults"


def test_a_name_registered_twice_raises() -> None:
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        registry.registry("defence", (*FAMILY.values(), Toy))


@pytest.mark.parametrize("name", FAMILY)
def test_decisions_are_part_of_the_state(name: str, model: TwoTower, pairs: TrainingPairs) -> None:
    first, second = (registry.make("defence", FAMILY, name) for _ in range(2))
    for epoch in range(2):
        ask(first, epoch, model, pairs)
    second.load_state_dict(through_a_file(first.state_dict()))
    for field in fields(Decisions):
        mine, theirs = (getattr(d.decisions(pairs), field.name) for d in (first, second))
        np.testing.assert_array_equal(mine, theirs)


def test_a_batch_in_which_nobody_has_a_caption(model: TwoTower, pairs: TrainingPairs) -> None:
    learner, defense = copy.deepcopy(model).train(), defenses.make("otcclip", lambda_view=0.5)
    plan = ask(defense, 0, model, pairs)
    silent = plan.index[plan.caption_of[plan.index] < 0]
    step = defense.step(batch_of(EpochPlan("train", silent, plan.caption_of, 2), pairs, 8), learner)
    assert torch.isfinite(step.loss)
    step.loss.backward()


@pytest.mark.parametrize("name", FAMILY)
def test_a_fine_tuner_mends_another_defences_run(name: str, model: TwoTower, pairs: TrainingPairs) -> None:
    """It starts from a defence that starts from nothing, and trains on trusted pairs alone."""
    defense = registry.make("defence", FAMILY, name)
    if not isinstance(defense, FineTuner):
        assert not hasattr(FAMILY[name], "starts_from")
        return
    assert not hasattr(FAMILY[FAMILY[name].starts_from], "starts_from")  # type: ignore[attr-defined]
    assert defense.warmup_epochs == 0 and 0 < defense.epoch_share <= 1 and defense.lr > 0
    assert pairs.trusted is not None
    assert pairs.trusted[ask(defense, 0, model, pairs).index].all()
    for nobody in (None, torch.zeros(len(pairs), dtype=torch.bool)):
        with pytest.raises(UserError, match=rf"{name}: fine-tunes on pairs that somebody vouches for, and got 0"):
            ask(registry.make("defence", FAMILY, name), 0, model, replace(pairs, trusted=nobody))


def test_trusted_keys_are_the_pairs_own(make_store: Callable[..., PairStore], model: TwoTower) -> None:
    store = make_store(12, 4)
    seen = training_pairs(store, model, ["pair-0007", "pair-0002"])
    assert seen.trusted is not None and torch.nonzero(seen.trusted)[:, 0].tolist() == [2, 7]
    with pytest.raises(UserError, match="trusted keys: 1 of 2 name no training pair, 'stranger' for one"):
        training_pairs(store, model, ["pair-0007", "stranger"])
