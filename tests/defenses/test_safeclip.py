"""SafeCLIP: its three stages, the mixture's threshold, how the safe share grows, and what each pair learns from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.data.pairs import PairStore
from otcclip.defenses import SafeCLIP, safeclip
from otcclip.defenses.base import HOLD_BACK, KEEP, EpochContext, EpochPlan, PairBatch, TrainingPairs, training_pairs
from otcclip.defenses.losses import clip_loss, neighbour_loss
from otcclip.defenses.safeclip import high_component, safe_count
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower
from otcclip.models.encode import encode_captions, encode_images


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    """100 pictures of 20 things, 100 captions."""
    return training_pairs(make_store(100, 20, own_caption=True), model)


def ask(defense: SafeCLIP, epoch: int, model: TwoTower, pairs: TrainingPairs, epochs: int = 16) -> EpochPlan:
    torch.manual_seed(epoch)
    return defense.begin_epoch(EpochContext(epoch, epochs, 0, model, pairs))


def batch_of(pairs: TrainingPairs, rows: list[int], apart: list[int]) -> PairBatch:
    """The pairs `rows`, those at `apart` in the batch apart; second views mirrored and without the last word."""
    index = torch.tensor(rows)
    unique, caption = torch.unique(pairs.caption_of[index], return_inverse=True)
    images, tokens = pairs.images[index].float() / 255, pairs.tokens[unique]
    shorter = tokens.clone()
    shorter[:, 1:-1] = tokens[:, 2:]
    mask = torch.zeros(len(rows), dtype=torch.bool)
    mask[apart] = True
    return PairBatch(index, (images, images.flip(-1)), tokens, caption, (shorter,), mask)


def test_high_component_is_the_posterior() -> None:
    """Two normal clusters of known shape: Bayes' rule with the true densities, within what 4000 draws can tell."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.05, 0.05, 3000), rng.normal(0.35, 0.08, 1000)])
    found = high_component(values, seed=0)

    def density(mean: float, sd: float, weight: float) -> np.ndarray:
        return weight * np.exp(-(((values - mean) / sd) ** 2) / 2) / sd

    low, high = density(0.05, 0.05, 0.75), density(0.35, 0.08, 0.25)
    assert np.abs(found - high / (low + high)).mean() < 0.01
    assert found[3000:].mean() > 0.9 > 0.1 > found[:3000].mean()
    np.testing.assert_array_equal(found, high_component(values, seed=0))


def test_the_threshold_is_on_the_posterior(
    model: TwoTower, pairs: TrainingPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior = np.linspace(0, 1, 100)[np.random.default_rng(0).permutation(100)]
    monkeypatch.setattr(safeclip, "high_component", lambda values, seed: posterior)
    for confident in (0.9, 0.5):
        defense = SafeCLIP(unimodal_epochs=0, slow_epochs=0, confident=confident)
        plan = ask(defense, 0, model, pairs)
        assert plan.apart is not None
        assert plan.apart.tolist() == (posterior < confident).tolist()
        decided = defense.decisions(pairs)
        assert (decided.action == np.where(posterior < confident, HOLD_BACK, KEEP)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1000, 1200))
def test_growth_is_one_percent_an_epoch_up_to_the_cap(first: int, pairs: int) -> None:
    counts = [safe_count(first, grown, pairs, 0.01, 0.85) for grown in range(120)]
    assert counts[0] == min(first, int(0.85 * pairs)) and counts[-1] == int(0.85 * pairs) == max(counts)
    for grown, (now, then) in enumerate(itertools.pairwise(counts)):
        assert 0 <= then - now <= pairs * 0.01 + 1, "monotone, in small steps"
        assert now == int(0.85 * pairs) or now == first + round(grown * 0.01 * pairs)


def test_stages(model: TwoTower, pairs: TrainingPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 unimodal epochs, 1 slow one, then the mixture's 30 pairs and 10 % more an epoch, the most alike first."""
    image, text = encode_images(model, pairs.images).pooled, encode_captions(model, pairs.tokens).pooled
    cosine = (image * text[pairs.caption_of]).sum(1)
    order = cosine.argsort(descending=True)
    low_but_chosen = torch.zeros(100)
    low_but_chosen[order[-30:]] = 1.0  # the first safe set is the mixture's, whatever the order
    monkeypatch.setattr(safeclip, "high_component", lambda values, seed: low_but_chosen.numpy())
    defense = SafeCLIP(unimodal_epochs=2, slow_epochs=1, growth=0.1, cap=0.45)
    kept = []
    for epoch in range(6):
        plan = ask(defense, epoch, model, pairs)
        assert plan.phase == "train" and plan.index.tolist() == list(range(100))
        assert torch.equal(plan.caption_of, pairs.caption_of)
        decided = defense.decisions(pairs)
        kept.append(set(np.nonzero(decided.action == KEEP)[0].tolist()))
        if epoch < 2:
            assert (plan.views, plan.text_views, plan.strong, plan.lr_scale) == (2, 2, "all", 1.0)
            assert plan.apart is not None and plan.apart.all() and np.isnan(decided.suspicion).all()
        elif epoch == 2:
            assert (plan.views, plan.text_views, plan.strong, plan.lr_scale) == (1, 1, "none", 0.01)
            assert plan.apart is None and np.isnan(decided.suspicion).all()
        else:
            assert (plan.views, plan.text_views, plan.strong, plan.lr_scale) == (2, 2, "further", 1.0)
            np.testing.assert_allclose(decided.suspicion, -cosine.numpy(), atol=1e-6)
    ranked = order.tolist()
    assert kept == [set(), set(), set(range(100)), set(ranked[-30:]), set(ranked[:40]), set(ranked[:45])]


def test_a_mixture_that_trusts_too_many_is_cut_down_to_the_cap(
    model: TwoTower, pairs: TrainingPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safeclip, "high_component", lambda values, seed: np.ones(100))
    defense = SafeCLIP(unimodal_epochs=0, slow_epochs=0)
    assert [int((~ask(defense, epoch, model, pairs).apart).sum()) for epoch in range(3)] == [85, 85, 85]


def test_the_loss_is_the_sum_of_its_parts(model: TwoTower, pairs: TrainingPairs) -> None:
    """CLIP over the pairs that are together, neighbours over those apart, each by its own pool."""
    defense = SafeCLIP(unimodal_epochs=1, pool=0.1)
    ask(defense, 0, model, pairs)
    rows, apart = list(range(10)), [1, 4, 5, 9]
    together = [i for i in range(10) if i not in apart]
    batch = batch_of(pairs, rows, apart)
    assert defense._images is not None and defense._texts is not None
    pools = [pool.columns["vector"].clone() for pool in (defense._images, defense._texts)]
    with torch.no_grad():
        step = defense.step(batch, model)
        one, two = (model.image(view).pooled for view in batch.images)
        text, said = model.text(batch.tokens).pooled, model.text(batch.token_views[0]).pooled
    of = batch.caption

    def neighbours(a: torch.Tensor, b: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        near_a, near_b = pool[(a @ pool.T).argmax(1)], pool[(b @ pool.T).argmax(1)]
        return neighbour_loss(a, b, near_a, near_b, 0.1)

    expected = {
        "clip": clip_loss(one[together], text[of[together]], torch.arange(6), model.logit_scale),
        "images": neighbours(one[apart], two[apart], pools[0]),
        "captions": neighbours(text[of[apart].sort().values], said[of[apart].sort().values], pools[1]),
    }
    assert step.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(step.terms[name], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.loss, sum(step.terms.values()))
    assert defense._images.columns["id"][-10:].tolist() == rows
    assert defense._texts.columns["id"][-10:].tolist() == sorted(pairs.caption_of[rows].tolist())


def test_a_pair_apart_does_not_know_its_caption(model: TwoTower, pairs: TrainingPairs) -> None:
    """Captions handed round among pairs apart change nothing; among pairs together they do."""
    rows = list(range(8))
    for apart, changes in ((rows, False), ([], True)):
        losses = []
        for turn in (0, 3):
            defense = SafeCLIP(unimodal_epochs=1)
            ask(defense, 0, model, pairs)
            batch = batch_of(pairs, rows, apart)
            with torch.no_grad():
                losses.append(defense.step(replace(batch, caption=batch.caption.roll(turn)), model).loss)
        assert bool((losses[0] - losses[1]).abs() > 1e-5) is changes
    assert set(defense.step(batch_of(pairs, rows, []), model).terms) == {"clip"}


def test_too_few_epochs_are_one_line(model: TwoTower, pairs: TrainingPairs) -> None:
    with pytest.raises(UserError, match="safeclip: 5 unimodal and 1 slow epochs leave none of 6"):
        ask(SafeCLIP(), 0, model, pairs, epochs=6)


@pytest.mark.parametrize("wrong", [{"unimodal_epochs": -1}, {"cap": 0.0}, {"confident": 2.0}, {"growth": -0.1}])
def test_options_that_make_no_sense_are_one_line(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="safeclip: epochs and growth are 0 or more"):
        SafeCLIP(**wrong)  # type: ignore[arg-type]
