"""OTCCLIP's decisions: what evidence trusts, what a model that knows the truth lets in, what is re-paired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.data.pairs import PairStore
from otcclip.defenses import OTCClip
from otcclip.defenses.base import (
    HOLD_BACK,
    KEEP,
    REPAIR,
    EpochContext,
    EpochPlan,
    PairBatch,
    TrainingPairs,
    training_pairs,
)
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower
from otcclip.models.two_tower import Features
from otcclip.transport import FeatureSets

Make = Callable[..., PairStore]
FALSE = 12


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@dataclass(frozen=True)
class Corpus:
    """256 pictures of 32 things, each with its own caption; the captions of `false` name another thing."""

    pairs: TrainingPairs
    things: np.ndarray
    false: np.ndarray

    def spoken(self, caption: int) -> str:
        return self.pairs.captions[caption].split(" | ")[0]


@pytest.fixture(scope="module")
def corpus(make_store: Make, model: TwoTower) -> Corpus:
    store = make_store(256, 32, own_caption=True)
    false = np.random.default_rng(0).choice(256, FALSE, replace=False)
    captions = list(store.captions)
    for k, i in enumerate(false):
        captions[i] = f"{store.labels[(i + 7) % 256]} | fake {k}"
    pairs = training_pairs(replace(store, captions=tuple(captions)).without_labels(), model)
    return Corpus(pairs, np.array(store.labels), false)


def ask(defense: OTCClip, epoch: int, model: TwoTower, pairs: TrainingPairs) -> EpochPlan:
    torch.manual_seed(epoch)
    return defense.begin_epoch(EpochContext(epoch, 8, 0, model, pairs))


def batch_of(pairs: TrainingPairs, rows: list[int], caption: list[int], views: int = 1) -> PairBatch:
    images = pairs.images[rows].float() / 255
    return PairBatch(torch.tensor(rows), (images,) * views, pairs.tokens[: max(caption) + 1], torch.tensor(caption))


def test_training_starts_on_what_evidence_bears_out(corpus: Corpus, model: TwoTower) -> None:
    defense = OTCClip()
    plan = ask(defense, 0, model, corpus.pairs)
    decided = defense.decisions(corpus.pairs)
    trusted = decided.action == KEEP
    assert not trusted[corpus.false].any() and not (decided.action == REPAIR).any()
    assert trusted.sum() > 30
    assert trusted.tolist() == (decided.suspicion <= defense.alpha).tolist()
    honest = np.setdiff1d(np.arange(256), corpus.false)
    assert np.median(decided.suspicion[corpus.false]) > 5 * np.median(decided.suspicion[honest])
    # As many visits as pairs, spread evenly over those trusted.
    visits = np.bincount(plan.index.numpy(), minlength=256)
    assert len(plan.index) == 256 and (visits[~trusted] == 0).all()
    assert visits[trusted].max() - visits[trusted].min() <= 1


def test_fewer_trusted_at_a_stricter_level(corpus: Corpus, model: TwoTower) -> None:
    kept = []
    for alpha in (0.01, 0.03, 0.5):
        defense = OTCClip(alpha=alpha)
        ask(defense, 0, model, corpus.pairs)
        kept.append(int((defense.decisions(corpus.pairs).action == KEEP).sum()))
    assert kept[0] < kept[1] < kept[2]


def test_nothing_to_trust_is_one_line(make_store: Make, model: TwoTower) -> None:
    """With eight captions no share is below 1/8."""
    pairs = training_pairs(make_store(32, 8), model)
    with pytest.raises(UserError, match=r"bear out only 0 of 32 pairs at alpha 0\.02"):
        ask(OTCClip(), 0, model, pairs)


@pytest.fixture
def truth(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows what every picture shows and likes a caption of that thing best, its own if that is true."""
    generator = torch.Generator().manual_seed(0)
    own = corpus.pairs.caption_of.numpy()
    names = sorted({corpus.spoken(c) for c in range(len(corpus.pairs.captions))})
    thing = F.one_hot(torch.tensor([names.index(corpus.spoken(c)) for c in range(len(corpus.pairs.captions))]), 64)
    text = F.normalize(thing + 0.1 * torch.randn(len(thing), 64, generator=generator), dim=1)
    liked = own.copy()
    for i in corpus.false:
        same = [c for c in range(len(thing)) if corpus.spoken(c) == corpus.things[i] and c not in own[corpus.false]]
        liked[i] = same[0]
    row_of = {image.numpy().tobytes(): i for i, image in enumerate(corpus.pairs.images)}

    def images(_: object, given: Tensor, view: object = None) -> Features:
        pooled = text[liked[[row_of[image.numpy().tobytes()] for image in given]]]
        return Features(pooled, FeatureSets.from_dense(pooled[:, None]))

    def captions(_: object, tokens: Tensor) -> Features:
        return Features(text, FeatureSets.from_dense(text[:, None]))

    monkeypatch.setattr("otcclip.defenses.otcclip.encode_images", images)
    monkeypatch.setattr("otcclip.defenses.otcclip.encode_captions", captions)


@pytest.fixture
def certain(model: TwoTower) -> TwoTower:
    """At the highest temperature, so that a match is a confident one."""
    sure = create_two_tower("otcclip-tiny", seed=0).eval()
    with torch.no_grad():
        sure.clip.logit_scale.fill_(4.6)
    return sure


def test_a_model_that_knows_lets_the_true_in_and_repairs_the_false(
    corpus: Corpus, certain: TwoTower, truth: None
) -> None:
    defense = OTCClip(first_refresh=2, refresh=3)
    ask(defense, 0, certain, corpus.pairs)
    first = defense.decisions(corpus.pairs).action.copy()
    ask(defense, 1, certain, corpus.pairs)
    assert (defense.decisions(corpus.pairs).action == first).all(), "asked before its time"
    plan = ask(defense, 2, certain, corpus.pairs)
    decided = defense.decisions(corpus.pairs)
    honest = np.setdiff1d(np.arange(256), corpus.false)

    assert (decided.action[first == KEEP] == KEEP).all()
    assert (decided.action[honest] == KEEP).mean() > 0.9 > (first[honest] == KEEP).mean()
    assert not (decided.action[corpus.false] == KEEP).any()
    repaired = np.flatnonzero(decided.action == REPAIR)
    assert len(repaired) >= 3 and set(repaired) <= set(corpus.false)
    assert all(corpus.spoken(decided.caption_of[i]) == corpus.things[i] for i in repaired)
    assert decided.suspicion[corpus.false].min() > np.quantile(decided.suspicion[honest], 0.95)
    # What is decided is what is trained on.
    assert set(plan.index.tolist()) == set(np.flatnonzero(decided.action != HOLD_BACK).tolist())
    assert plan.caption_of[repaired].tolist() == decided.caption_of[repaired].tolist()

    ask(defense, 3, certain, corpus.pairs)
    assert (defense.decisions(corpus.pairs).action == decided.action).all(), "asked again before its time"


@pytest.mark.parametrize("off", ["grow", "repair"])
def test_growth_and_repair_can_be_switched_off(off: str, corpus: Corpus, certain: TwoTower, truth: None) -> None:
    defense = OTCClip(first_refresh=1, refresh=1, **{off: False})
    ask(defense, 0, certain, corpus.pairs)
    before = defense.decisions(corpus.pairs).action.copy()
    ask(defense, 1, certain, corpus.pairs)
    after = defense.decisions(corpus.pairs).action
    if off == "grow":
        assert ((before == KEEP) == (after == KEEP)).all() and (after == REPAIR).any()
    else:
        assert not (after == REPAIR).any() and (after == KEEP).sum() > (before == KEEP).sum()


def test_a_model_without_confidence_repairs_nothing(corpus: Corpus, certain: TwoTower, truth: None) -> None:
    with torch.no_grad():
        certain.clip.logit_scale.fill_(0.0)
    defense = OTCClip(first_refresh=1)
    for epoch in range(2):
        ask(defense, epoch, certain, corpus.pairs)
    decided = defense.decisions(corpus.pairs)
    assert not (decided.action == REPAIR).any()
    assert not (decided.action[corpus.false] == KEEP).any()


def test_warm_up_shows_no_caption(corpus: Corpus) -> None:
    """Two views of each image, nothing for the text tower to learn; then training as usual."""
    learner, defense = create_two_tower("otcclip-tiny", seed=0), OTCClip(warmup_epochs=2)
    for epoch in range(2):
        plan = ask(defense, epoch, learner, corpus.pairs)
        assert plan.phase == "warm-up" and plan.views == 2 and len(plan.index) == 256
    defense.step(batch_of(corpus.pairs, [0, 1, 2, 3], [0, 1, 2, 3], views=2), learner).loss.backward()
    assert learner.clip.visual.conv1.weight.grad is not None
    assert learner.clip.token_embedding.weight.grad is None and learner.clip.logit_scale.grad is None
    assert ask(defense, 2, learner, corpus.pairs).phase == "train"


def test_the_loss_is_the_sum_of_its_terms(corpus: Corpus, model: TwoTower) -> None:
    defense = OTCClip(lambda_ot=0.3, lambda_view=0.7)
    ask(defense, 0, model, corpus.pairs)
    with torch.no_grad():
        step = defense.step(batch_of(corpus.pairs, [3, 4, 5, 6], [0, 1, 2, 2], views=2), model)
    assert set(step.terms) == {"clip", "ot", "views"}
    torch.testing.assert_close(step.loss, step.terms["clip"] + 0.3 * step.terms["ot"] + 0.7 * step.terms["views"])
    with torch.no_grad():
        plain = OTCClip(lambda_ot=0.0).step(batch_of(corpus.pairs, [3, 4, 5, 6], [0, 1, 2, 2]), model)
    assert set(plain.terms) == {"clip"}
    torch.testing.assert_close(plain.loss, step.terms["clip"])


def test_transport_teaches_the_local_head(corpus: Corpus) -> None:
    learner = create_two_tower("otcclip-tiny", seed=0)
    OTCClip().step(batch_of(corpus.pairs, [0, 1, 2, 3], [0, 1, 2, 3]), learner).loss.backward()
    assert learner.local_head is not None and learner.local_head.weight.grad is not None
    assert learner.local_head.weight.grad.abs().max() > 0


def test_images_held_back_learn_from_their_views_alone(corpus: Corpus, model: TwoTower) -> None:
    """With `lambda_view` every image is visited; those held back carry no caption and change no caption's loss."""
    defense = OTCClip(lambda_view=0.5)
    plan = ask(defense, 0, model, corpus.pairs)
    held_back = defense.decisions(corpus.pairs).action == HOLD_BACK
    assert plan.views == 2 and sorted(plan.index.tolist()) == list(range(256))
    assert ((plan.caption_of == -1).numpy() == held_back).all()
    with torch.no_grad():
        alone = defense.step(batch_of(corpus.pairs, [3, 4, 5], [0, 1, 2], views=2), model)
        mixed = defense.step(batch_of(corpus.pairs, [3, 9, 4, 5, 10], [0, -1, 1, 2, -1], views=2), model)
    for term in ("clip", "ot"):
        torch.testing.assert_close(mixed.terms[term], alone.terms[term], atol=1e-5, rtol=1e-5)
    assert mixed.terms["views"] != alone.terms["views"]
