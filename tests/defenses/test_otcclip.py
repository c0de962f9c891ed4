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
from otcclip.defenses import OTCClip, SafeCLIP
from otcclip.defenses.base import (
    HOLD_BACK,
    KEEP,
    REPAIR,
    Defense,
    EpochContext,
    EpochPlan,
    PairBatch,
    TrainingPairs,
    training_pairs,
)
from otcclip.defenses.losses import clip_loss
from otcclip.errors import UserError
from otcclip.evidence.belief import Belief
from otcclip.evidence.captions import caption_agreement
from otcclip.evidence.neighbours import neighbour_evidence
from otcclip.evidence.trust import believed, by_diversity, in_measure
from otcclip.evidence.votes import p_value, share_without
from otcclip.evidence.words import rarely_unheard
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


def ask(defense: Defense, epoch: int, model: TwoTower, pairs: TrainingPairs) -> EpochPlan:
    torch.manual_seed(epoch)
    return defense.begin_epoch(EpochContext(epoch, 8, 0, model, pairs))


def _belief(defense: OTCClip) -> Belief:
    assert defense._belief is not None
    return defense._belief


def batch_of(pairs: TrainingPairs, rows: list[int], caption: list[int], views: int = 1) -> PairBatch:
    images = pairs.images[rows].float() / 255
    return PairBatch(torch.tensor(rows), (images,) * views, pairs.tokens[: max(caption) + 1], torch.tensor(caption))


def test_training_starts_on_what_evidence_bears_out(corpus: Corpus, model: TwoTower) -> None:
    defense = OTCClip()
    plan = ask(defense, 0, model, corpus.pairs)
    decided = defense.decisions(corpus.pairs)
    trusted = decided.action == KEEP
    assert trusted[corpus.false].sum() <= 1, "of twelve a level of .05 lets .6 in by chance"
    assert not (decided.action == REPAIR).any()
    assert trusted.sum() > 30
    pairs, p = corpus.pairs, torch.from_numpy(decided.suspicion).float()
    found = neighbour_evidence(pairs.images, pairs.tokens, pairs.caption_of)
    expected = believed(p, pairs.caption_of, found.agreement, defense.alpha)
    expected = rarely_unheard(expected, p, pairs.caption_of, found.words, found.unheard)
    place = by_diversity(found.vectors, pairs.caption_of, p)
    expected = in_measure(expected, place, p, pairs.caption_of, found.agreement)
    assert trusted.tolist() == expected.tolist()
    honest = np.setdiff1d(np.arange(256), corpus.false)
    assert np.median(decided.suspicion[corpus.false]) > 5 * np.median(decided.suspicion[honest])
    # As many visits as pairs, spread evenly over those trusted.
    visits = np.bincount(plan.index.numpy(), minlength=256)
    assert len(plan.index) == 256 and (visits[~trusted] == 0).all()
    assert visits[trusted].max() - visits[trusted].min() <= 1


def test_fewer_trusted_at_a_stricter_level(corpus: Corpus, model: TwoTower) -> None:
    kept = []
    for alpha in (0.05, 0.2, 0.8):
        defense = OTCClip(alpha=alpha)
        ask(defense, 0, model, corpus.pairs)
        kept.append(int((defense.decisions(corpus.pairs).action == KEEP).sum()))
    assert kept[0] < kept[1] < kept[2]


def test_a_claim_made_three_times_is_three_tries(make_store: Make, model: TwoTower) -> None:
    """Three copies of a picture under its own caption: each is as believable as one was, and is held to a third of
    the level."""
    store = make_store(256, 32, own_caption=True)
    images, captions = store.images.copy(), list(store.captions)
    images[[40, 80]], captions[40], captions[80] = images[0], captions[0], captions[0]
    pairs = training_pairs(replace(store, images=images, captions=tuple(captions)), model)
    found = neighbour_evidence(pairs.images, pairs.tokens, pairs.caption_of)
    own = p_value(found.own, found.by_chance).double().numpy()
    defense = OTCClip(alpha=2 * float(own[0]))
    ask(defense, 0, model, pairs)
    decided = defense.decisions(pairs)
    claims = np.ones(256)
    claims[[0, 40, 80]] = 3
    np.testing.assert_allclose(decided.suspicion, np.minimum(own * claims, 1), rtol=1e-6)
    assert (decided.action[[0, 40, 80]] == HOLD_BACK).all() and (own[[0, 40, 80]] <= defense.alpha).all()


def test_nothing_to_trust_is_one_line(make_store: Make, model: TwoTower) -> None:
    """With eight captions no share is below 1/16."""
    pairs = training_pairs(make_store(32, 8), model)
    with pytest.raises(UserError, match=r"bear out only 0 of 32 pairs at alpha 0\.05"):
        ask(OTCClip(), 0, model, pairs)


def test_nobody_left_to_train_on_is_one_line(
    corpus: Corpus, certain: TwoTower, truth: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every claim was closed and nobody is borne out by those left."""

    def hear(self: Belief, rows: Tensor, share: Tensor, in_force: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(in_force), in_force

    monkeypatch.setattr(Belief, "hear", hear)
    defense = OTCClip(first_refresh=1)
    ask(defense, 0, certain, corpus.pairs)
    with pytest.raises(UserError, match="after 1 epochs none of 256 pairs is believed any more"):
        ask(defense, 1, certain, corpus.pairs)


@pytest.mark.parametrize("defense", [OTCClip(), SafeCLIP(unimodal_epochs=0, slow_epochs=0)])
def test_one_pair_is_one_line(defense: OTCClip | SafeCLIP, make_store: Make, model: TwoTower) -> None:
    with pytest.raises(UserError, match=rf"{defense.name}: 1 pair; "):
        ask(defense, 0, model, training_pairs(make_store(1, 1), model))


@dataclass
class Oracle:
    """Stands in for the model: `likes[i]` is the caption that picture i is shown to be nearest to, -1 for all of its
    own thing alike. `asked` counts how often it was consulted."""

    corpus: Corpus
    likes: list[int]
    asked: int = 0

    def __post_init__(self) -> None:
        pairs = self.corpus.pairs
        spoken = [self.corpus.spoken(caption) for caption in range(len(pairs.captions))]
        names = sorted(set(spoken))
        noise = 0.1 * torch.randn(len(spoken), 64, generator=torch.Generator().manual_seed(0))
        thing = torch.eye(64)
        self.text = F.normalize(thing[[names.index(name) for name in spoken]] + noise, dim=1)
        self.image = torch.stack(
            [
                self.text[caption] if caption >= 0 else thing[names.index(name)]
                for caption, name in zip(self.likes, self.corpus.things, strict=True)
            ]
        )
        self.row = {image.numpy().tobytes(): i for i, image in enumerate(pairs.images)}

    def encode_images(self, _: object, given: Tensor, view: object = None, *, rows: Tensor) -> Features:
        pooled = self.image[[self.row[image.numpy().tobytes()] for image in given[rows]]]
        return Features(pooled, FeatureSets.from_dense(pooled[:, None]))

    def encode_captions(self, _: object, tokens: Tensor) -> Features:
        self.asked += 1
        return Features(self.text, FeatureSets.from_dense(self.text[:, None]))

    def speak(self, patch: pytest.MonkeyPatch) -> Oracle:
        patch.setattr("otcclip.defenses.otcclip.encode_images", self.encode_images)
        patch.setattr("otcclip.defenses.otcclip.encode_captions", self.encode_captions)
        return self


def caption_of_thing(corpus: Corpus, thing: str) -> int:
    """A caption that names `thing` and belongs to a picture of it."""
    honest = np.setdiff1d(np.arange(256), corpus.false)
    return next(int(corpus.pairs.caption_of[i]) for i in honest if corpus.things[i] == thing)


@pytest.fixture
def truth(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A model that knows what every picture shows, and prefers one true caption where the own is false."""
    likes = [-1] * 256
    for i in corpus.false:
        likes[i] = caption_of_thing(corpus, corpus.things[i])
    return Oracle(corpus, likes).speak(monkeypatch)


@pytest.fixture
def error(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """A model as sure, which takes a picture under a false caption for a third thing."""
    likes = [-1] * 256
    for i in corpus.false:
        likes[i] = caption_of_thing(corpus, corpus.things[(i + 3) % 256])
    return Oracle(corpus, likes).speak(monkeypatch)


@pytest.fixture
def certain(model: TwoTower) -> TwoTower:
    """At the highest temperature, so that a match is a confident one."""
    sure = create_two_tower("otcclip-tiny", seed=0).eval()
    with torch.no_grad():
        sure.clip.logit_scale.fill_(4.6)
    return sure


def test_a_model_that_knows_lets_the_true_in_and_repairs_the_false(
    corpus: Corpus, certain: TwoTower, truth: Oracle
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
    assert ((decided.action == KEEP) == (first == KEEP))[corpus.false].all()
    repaired = np.flatnonzero(decided.action == REPAIR)
    assert len(repaired) >= 3 and set(repaired) <= set(corpus.false)
    assert all(corpus.spoken(decided.caption_of[i]) == corpus.things[i] for i in repaired)
    assert np.sort(decided.suspicion[corpus.false])[1] > np.quantile(decided.suspicion[honest], 0.95)
    # What is decided is what is trained on.
    assert set(plan.index.tolist()) == set(np.flatnonzero(decided.action != HOLD_BACK).tolist())
    assert plan.caption_of[repaired].tolist() == decided.caption_of[repaired].tolist()

    ask(defense, 3, certain, corpus.pairs)
    assert (defense.decisions(corpus.pairs).action == decided.action).all(), "asked again before its time"


def test_a_model_is_no_witness_to_a_crowd(corpus: Corpus, certain: TwoTower, truth: Oracle) -> None:
    """With every pair crowded nobody enters by what the model says, and each keeps its look-alikes' word."""
    defense = OTCClip()
    ask(defense, 0, certain, corpus.pairs)
    before = defense.decisions(corpus.pairs)
    action, suspicion = before.action.copy(), before.suspicion.copy()
    _belief(defense).unwitnessed = torch.ones(len(corpus.pairs), dtype=torch.bool)
    ask(defense, 4, certain, corpus.pairs)
    after = defense.decisions(corpus.pairs)
    free = ~_belief(defense).suspect.numpy()  # under a closed caption the share is taken as it is
    assert free.mean() > 0.9
    np.testing.assert_allclose(after.suspicion[free], suspicion[free], rtol=1e-6)
    assert (after.suspicion >= suspicion * (1 - 1e-6)).all(), "nobody gains by what the model says"
    assert ((after.action == KEEP) == (action == KEEP))[free].all()
    assert (action == KEEP)[after.action == KEEP].all()


def test_under_a_closed_claim_only_look_alikes_count_and_not_those_whom_only_the_model_speaks_for(
    corpus: Corpus, certain: TwoTower, truth: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model lets some in; under every second caption it then proves no witness, for good, also after a resume."""
    closed = torch.zeros(len(corpus.pairs.captions), dtype=torch.bool)
    spoken_for = []

    def open_ones(vouched: Tensor, caption_of: Tensor, agreement: Tensor) -> Tensor:
        spoken_for.append(vouched)
        return ~closed

    monkeypatch.setattr("otcclip.evidence.belief.usually_vouched", open_ones)
    defense = OTCClip(first_refresh=1, refresh=1)
    kept = []
    for epoch in range(2):
        ask(defense, epoch, certain, corpus.pairs)
        kept.append(torch.from_numpy(defense.decisions(corpus.pairs).action == KEEP))
    first, grown = kept[0], kept[1] & ~kept[0]
    assert not bool((spoken_for[0] & first).any()) and bool(spoken_for[0][grown].any())

    closed[::2] = True
    held_to = closed[corpus.pairs.caption_of]
    assert bool((grown & held_to).any()) and bool((grown & ~held_to).any())
    resumed = OTCClip(first_refresh=1, refresh=1)
    resumed.load_state_dict(defense.state_dict())
    ask(resumed, 2, certain, corpus.pairs)
    after = resumed.decisions(corpus.pairs)
    evidence = neighbour_evidence(corpus.pairs.images, corpus.pairs.tokens, corpus.pairs.caption_of)
    rows = torch.nonzero(held_to)[:, 0]
    anew = share_without(
        spoken_for[1] & held_to,
        rows,
        evidence.voters,
        evidence.weight,
        corpus.pairs.caption_of,
        evidence.agreement,
    )
    alone = (torch.maximum(anew, evidence.own[rows]) * evidence.copies[rows]).clamp(max=1.0)
    np.testing.assert_allclose(after.suspicion[rows], alone, rtol=1e-6)
    assert (after.action[first & ~held_to] == KEEP).all() and (after.action[grown & ~held_to] == KEEP).all()
    let_go = kept[1] & torch.from_numpy(after.action != KEEP)
    assert bool(let_go.any()) and not bool((let_go & ~held_to).any())
    repaired = np.flatnonzero(after.action == REPAIR)
    assert not closed[after.caption_of[repaired]].any(), "re-paired to a claim under which the model is no witness"

    closed[:] = False
    ask(resumed, 3, certain, corpus.pairs)
    later = resumed.decisions(corpus.pairs).suspicion[rows]
    assert (later >= alone.numpy() * (1 - 1e-6)).all(), "the model's word counts again"
    assert _belief(resumed).unwitnessed[let_go].all()


def test_who_uses_a_doubtful_word_is_held_back(
    corpus: Corpus, certain: TwoTower, truth: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and at a refresh after a resume by a model that knows better."""
    even = torch.arange(len(corpus.pairs)) % 2 == 0
    monkeypatch.setattr(
        "otcclip.evidence.belief.neighbour_evidence", lambda *given: replace(neighbour_evidence(*given), doubtful=even)
    )
    defense = OTCClip()
    ask(defense, 0, certain, corpus.pairs)
    first = defense.decisions(corpus.pairs).action.copy()
    resumed = OTCClip()
    resumed.load_state_dict(defense.state_dict())
    ask(resumed, 4, certain, corpus.pairs)
    later = resumed.decisions(corpus.pairs).action
    assert (first[::2] == HOLD_BACK).all() and not (later[::2] == KEEP).any()
    assert (first[1::2] == KEEP).any() and (later[1::2] == KEEP).sum() > (first[1::2] == KEEP).sum()


def test_who_uses_a_word_on_credit_is_held_back(
    corpus: Corpus, model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rule refuses does not enter, at the start and at a refresh after a resume."""
    asked = []

    def refuse_even(candidates: Tensor, p: Tensor, caption_of: Tensor, words: Tensor, lacking: Tensor) -> Tensor:
        asked.append((words, lacking))
        return candidates & (torch.arange(len(candidates)) % 2 == 1)

    monkeypatch.setattr("otcclip.evidence.belief.rarely_unheard", refuse_even)
    defense = OTCClip()
    ask(defense, 0, model, corpus.pairs)
    assert (defense.decisions(corpus.pairs).action[::2] == HOLD_BACK).all()
    resumed = OTCClip()
    resumed.load_state_dict(defense.state_dict())
    ask(resumed, 4, model, corpus.pairs)
    assert (resumed.decisions(corpus.pairs).action[::2] != KEEP).all()
    found = neighbour_evidence(corpus.pairs.images, corpus.pairs.tokens, corpus.pairs.caption_of)
    assert _belief(resumed).unwitnessed.equal(found.crowded)
    assert len(asked) == 2
    for words, lacking in asked:
        assert words.equal(found.words) and lacking.equal(found.unheard)


@pytest.mark.parametrize("off", ["grow", "repair"])
def test_growth_and_repair_can_be_switched_off(off: str, corpus: Corpus, certain: TwoTower, truth: Oracle) -> None:
    defense = OTCClip(first_refresh=1, refresh=1, **{off: False})
    ask(defense, 0, certain, corpus.pairs)
    before = defense.decisions(corpus.pairs).action.copy()
    ask(defense, 1, certain, corpus.pairs)
    after = defense.decisions(corpus.pairs).action
    if off == "grow":
        assert ((before == KEEP) == (after == KEEP)).all() and (after == REPAIR).any()
    else:
        assert not (after == REPAIR).any() and (after == KEEP).sum() > (before == KEEP).sum()


def test_what_is_no_nearer_than_pairs_in_force_is_not_repaired(
    corpus: Corpus, certain: TwoTower, truth: Oracle
) -> None:
    """Who turns away from every caption alike has the same nearest one, but not as near as others have theirs."""
    away = torch.eye(64)[63]  # no thing's
    truth.image[corpus.false] = F.normalize(truth.image[corpus.false] + away, dim=1)
    action = []
    for confident in (0.5, 0.0):
        defense = OTCClip(first_refresh=1, confident=confident)
        for epoch in range(2):
            ask(defense, epoch, certain, corpus.pairs)
        action.append(defense.decisions(corpus.pairs).action.copy())
        truth.image[np.setdiff1d(np.arange(256), corpus.false)[::2]] = -away  # somebody in force is as far as can be
    assert not (action[0] == REPAIR).any() and (action[1] == REPAIR).any()


def test_how_near_pairs_in_force_usually_are(
    corpus: Corpus, certain: TwoTower, truth: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantile of their cosines, of an even sample where there are many; nobody is near where none is in force."""
    defense = OTCClip(confident=0.25)
    ask(defense, 0, certain, corpus.pairs)
    text = Features(truth.text, FeatureSets.from_dense(truth.text[:, None]))
    rows = np.flatnonzero(defense.decisions(corpus.pairs).action == KEEP)
    cosine = (truth.image * truth.text[corpus.pairs.caption_of]).sum(dim=1)
    got = defense._usual_nearness(certain, corpus.pairs, text)
    assert float(got) == pytest.approx(float(cosine[rows].quantile(0.25)))
    monkeypatch.setattr("otcclip.defenses.otcclip.SEEN", 2)
    got = defense._usual_nearness(certain, corpus.pairs, text)
    assert float(got) == pytest.approx(float(cosine[rows[[0, -1]]].quantile(0.25))), "the first and the last of two"
    defense._action[:] = HOLD_BACK
    assert defense._usual_nearness(certain, corpus.pairs, text) == torch.inf


def test_a_confident_error_is_not_seconded(corpus: Corpus, certain: TwoTower, error: Oracle) -> None:
    """The look-alikes must bear a match out as they must a caption."""
    defense = OTCClip(first_refresh=1)
    for epoch in range(2):
        ask(defense, epoch, certain, corpus.pairs)
    assert error.asked == 1 and not (defense.decisions(corpus.pairs).action == REPAIR).any()


def test_only_a_caption_that_looks_random_is_replaced(corpus: Corpus, certain: TwoTower, truth: Oracle) -> None:
    defense = OTCClip(first_refresh=1, unlikely=1.01)
    for epoch in range(2):
        ask(defense, epoch, certain, corpus.pairs)
    assert truth.asked == 1 and not (defense.decisions(corpus.pairs).action == REPAIR).any()


def test_the_model_is_asked_when_it_is_time(corpus: Corpus, certain: TwoTower, truth: Oracle) -> None:
    """First after `first_refresh` training epochs, then every `refresh`; warm-up epochs do not count."""
    defense, asked = OTCClip(first_refresh=2, refresh=3, warmup_epochs=1), []
    for epoch in range(10):
        ask(defense, epoch, certain, corpus.pairs)
        asked.append(truth.asked)
    assert np.flatnonzero(np.diff([0, *asked])).tolist() == [3, 6, 9]


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


def test_a_warm_up_epoch_taken_up_midway_is_still_a_warm_up(corpus: Corpus) -> None:
    """The epoch's plan was made before the cut: what a step does must not wait for the next one."""
    learner, first = create_two_tower("otcclip-tiny", seed=0), OTCClip(warmup_epochs=2)
    ask(first, 0, learner, corpus.pairs)
    second = OTCClip(warmup_epochs=2)
    second.load_state_dict(first.state_dict())
    batch = batch_of(corpus.pairs, [0, 1, 2, 3], [0, 1, 2, 3], views=2)
    assert set(second.step(batch, learner).terms) == set(first.step(batch, learner).terms) == {"image views"}


def test_the_loss_is_the_sum_of_its_terms(corpus: Corpus, model: TwoTower) -> None:
    defense = OTCClip(lambda_ot=0.3, lambda_view=0.7)
    ask(defense, 0, model, corpus.pairs)
    with torch.no_grad():
        step = defense.step(batch_of(corpus.pairs, [3, 4, 5, 6], [0, 1, 2, 2], views=2), model)
    assert set(step.terms) == {"clip", "ot", "views"}
    torch.testing.assert_close(step.loss, step.terms["clip"] + 0.3 * step.terms["ot"] + 0.7 * step.terms["views"])
    without = OTCClip(lambda_ot=0.0)
    ask(without, 0, model, corpus.pairs)
    with torch.no_grad():
        plain = without.step(batch_of(corpus.pairs, [3, 4, 5, 6], [0, 1, 2, 2]), model)
    assert set(plain.terms) == {"clip"}
    torch.testing.assert_close(plain.loss, step.terms["clip"])


def test_a_caption_that_says_nearly_the_same_is_nearly_right_and_any_a_little(corpus: Corpus, model: TwoTower) -> None:
    defense = OTCClip(lambda_ot=0.0, smoothing=0.3)
    ask(defense, 0, model, corpus.pairs)
    rows = list(range(0, 256, 16))
    own = corpus.pairs.caption_of[rows]
    unique, caption = own.unique(return_inverse=True)
    agreement = torch.from_numpy(caption_agreement(corpus.pairs.tokens))[unique][:, unique]
    weight = agreement.fill_diagonal_(1.0)
    target = 0.7 * weight / weight.sum(dim=1, keepdim=True) + 0.3 / len(unique)
    assert 0 < float(target.diagonal().min()) < 1  # some captions here share words
    batch = batch_of(corpus.pairs, rows, caption.tolist())
    batch = replace(batch, tokens=corpus.pairs.tokens[unique])
    with torch.no_grad():
        image, text = model.image(batch.images[0]).pooled, model.text(batch.tokens).pooled
        expected = clip_loss(image, text, caption, model.logit_scale, target)
        torch.testing.assert_close(defense.step(batch, model).loss, expected)
        assert abs(float(expected - clip_loss(image, text, caption, model.logit_scale))) > 1e-4


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
