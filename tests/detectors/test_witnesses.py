"""A claim made unusually often, by who owns the look-alikes: who disputes it, and that every witness must then bear it
out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures, claims, lie_probability, p_values
from otcclip.detectors import witnesses as module
from otcclip.detectors.evidence import _record
from otcclip.detectors.mixture import fit_mixture
from otcclip.detectors.witnesses import SOUND, _unusual, best_of, disputed, disputes, joined, witnesses
from otcclip.models import Features
from otcclip.transport import FeatureSets

PAIRS, THINGS = 480, 48
POISON = [row for row in range(0, PAIRS, 12) if row % THINGS != 9]
CLAIM = "thing9 of kind0 no4"  # the last in order: what no caption of the reference has must not be taken for it


@pytest.fixture(scope="module")
def filled(make_features: Callable[..., PairFeatures]) -> PairFeatures:
    """A trigger fills every twelfth image, so that they are alike to the encoder; all of them are called thing 9."""
    honest = make_features(PAIRS, classes=THINGS, noise=0.6)
    said = list(honest.captions)
    patches = torch.stack([honest.image.local[i] for i in range(PAIRS)])
    trigger = F.normalize(torch.randn(24, generator=torch.Generator().manual_seed(3)), dim=0)
    named = honest.captions.index(CLAIM)
    pooled, tokens = honest.text.pooled.clone(), [honest.text.local[i] for i in range(PAIRS)]
    for row in POISON:
        said[row], pooled[row], tokens[row] = CLAIM, pooled[named], tokens[named]
        patches[row] = F.normalize(patches[row] + 1.2 * trigger, dim=1)
    image = Features(F.normalize(patches.mean(1), dim=-1), FeatureSets.from_dense(patches))
    text = Features(pooled, FeatureSets.from_list(tokens))
    return replace(honest, captions=tuple(said), image=image, text=text)


def called(features: PairFeatures, caption: str) -> np.ndarray:
    return np.array([one == caption for one in features.captions])


def test_the_worst_sound_witness_counts_and_only_under_a_disputed_caption(filled: PairFeatures) -> None:
    said = witnesses(filled).numpy()
    sound = np.median(said, axis=1) <= SOUND
    assert sound.all()
    assert [filled.kinds[0][i] for i in np.flatnonzero(disputes(filled).caption)] == [CLAIM]
    assert not disputes(filled).word.any(), "nine of ten who say kind0 are right"
    under, made = called(filled, CLAIM), p_values(filled)
    np.testing.assert_array_equal(made[~under], joined(filled)[~under])
    worst = best_of(said[sound].max(axis=0), claims(filled).made.numpy())
    np.testing.assert_allclose(made[under], np.maximum(joined(filled), worst)[under], rtol=1e-6)


def test_a_witness_that_the_enemy_owns_no_longer_outvotes_the_other(filled: PairFeatures) -> None:
    seen, _, ranked = witnesses(filled).numpy()
    assert np.median(seen[POISON]) < 0.05 < np.median(ranked[POISON])
    assert np.median(joined(filled)[POISON]) < np.median(p_values(filled)[POISON])
    assert np.median(lie_probability(filled)[POISON]) > 0.5


def test_a_witness_that_bears_out_hardly_anybody_disputes_nothing_and_is_not_asked(filled: PairFeatures) -> None:
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(0))
    tokens = [filled.text.local[i] for i in order.tolist()]
    deaf = replace(filled, text=Features(filled.text.pooled[order], FeatureSets.from_list(tokens)))
    seen, _, ranked = witnesses(deaf).numpy()
    assert np.median(seen) <= SOUND < np.median(ranked)
    assert not disputed(deaf).any(), "to the only sound witness the claim holds"
    np.testing.assert_array_equal(p_values(deaf), joined(deaf))


def test_a_caption_that_many_carry_rightly_is_disputed_by_nobody(make_features: Callable[..., PairFeatures]) -> None:
    """Forty pictures of one thing under one caption: asked like all others."""
    honest = make_features(PAIRS, classes=12, noise=0.6)
    said, pooled = list(honest.captions), honest.text.pooled.clone()
    tokens = [honest.text.local[i] for i in range(PAIRS)]
    for row in range(0, PAIRS, 12):
        said[row], pooled[row], tokens[row] = said[0], pooled[0], tokens[0]
    text = Features(pooled, FeatureSets.from_list(tokens))
    popular = replace(honest, captions=tuple(said), text=text)
    counts = np.bincount(popular.kinds[1])
    assert counts.max() == 40 and (counts > np.quantile(counts, 0.99)).any()
    assert not disputed(popular).any()
    assert np.median(lie_probability(popular)[::12]) < 0.02


def test_a_caption_is_disputed_where_the_likelihood_rises_with_more_lies(filled: PairFeatures) -> None:
    """By a grid: the share of lies under the claim that a sound witness's shares speak for most."""
    under, grid = called(filled, CLAIM), np.linspace(0.001, 0.999, 999)[:, None]
    said = witnesses(filled).numpy()
    likeliest = []
    for one in said[np.median(said, axis=1) <= SOUND]:
        mixture = fit_mixture(one)
        lies = 1 / (1 + np.exp(-mixture.log_ratio(one[under])))  # f0 / (f0 + f1)
        likelihood = np.log(grid * lies + (1 - grid) * (1 - lies)).sum(axis=1)
        likeliest.append(grid[likelihood.argmax(), 0] > mixture.share)
    assert likeliest == [False, True, True] and disputes(filled).caption.sum() == 1


@pytest.fixture(scope="module")
def spread(filled: PairFeatures) -> PairFeatures:
    """The same poison, no two pairs of which have a caption in common: only the name."""
    said = [f"{caption.split()[0]} view{i}" for i, caption in enumerate(filled.captions)]
    for row in POISON:
        said[row] = f"banana view{row}"
    return replace(filled, captions=tuple(said))


def test_a_word_by_which_three_of_four_lie_to_a_sound_witness_is_disputed(spread: PairFeatures) -> None:
    found = disputes(spread)
    assert not found.caption.any() and [spread.agreement.names[i] for i in np.flatnonzero(found.word)] == ["banana"]
    assert np.flatnonzero(disputed(spread)).tolist() == POISON
    said = witnesses(spread).numpy()
    sound = np.median(said, axis=1) <= SOUND
    worst = best_of(said[sound].max(axis=0), claims(spread).made.numpy())
    np.testing.assert_allclose(p_values(spread)[POISON], np.maximum(joined(spread), worst)[POISON], rtol=1e-6)
    assert np.median(p_values(spread)[POISON]) > 2 * np.median(joined(spread)[POISON])
    strangers = replace(spread, keys=tuple(f"new-{i}" for i in range(PAIRS)), reference=spread)
    unseen = replace(strangers, captions=tuple(f"{caption} unseen" for caption in spread.captions))
    assert np.flatnonzero(disputed(unseen)).tolist() == POISON


def test_a_word_that_half_say_rightly_is_disputed_by_nobody(spread: PairFeatures) -> None:
    """Thing 5's pictures, as many as there are poisoned ones, are called bananas as well."""
    said = list(spread.captions)
    for row in [i for i in range(PAIRS) if i % THINGS in (5, 17, 29, 41) and i not in POISON]:
        said[row] = f"banana view{row}"
    shared = replace(spread, captions=tuple(said))
    assert sum("banana" in caption for caption in said) > 2 * len(POISON) - 4
    assert not disputes(shared).word.any()


def test_nobody_disputes_a_word_without_having_been_asked_about_most_of_its_users(
    spread: PairFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = witnesses(spread).clone()
    said[1:, POISON[: len(POISON) * 2 // 3]] = torch.nan
    monkeypatch.setattr(module, "witnesses", lambda pairs: said)
    anew = replace(spread)
    assert len(disputes(anew).word) and not disputes(anew).word.any()
    said[1:] = witnesses(spread)[1:]
    said[1:, POISON[: len(POISON) // 3]] = torch.nan
    assert disputes(replace(spread)).word.any()


def test_who_is_not_asked_is_not_the_worst_witness(filled: PairFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    said = witnesses(filled).clone()
    said[:, 5], said[-1, 5] = 0.01, torch.nan
    monkeypatch.setattr(module, "witnesses", lambda pairs: said)
    monkeypatch.setattr(module, "disputed", lambda pairs: np.ones(PAIRS, bool))
    anew = replace(filled)
    expected = max(joined(anew)[5], best_of(np.array([0.01]), claims(filled).made.numpy()[5:6])[0])
    assert p_values(anew)[5] == pytest.approx(expected) and expected < 0.1


def test_a_claim_that_is_made_no_more_often_than_others_is_not_looked_at(filled: PairFeatures) -> None:
    """Three honest captions of 180 stand under more pairs than the claim: it is usual by the 99th percentile."""
    said = list(filled.captions)
    for row in [i for i in range(PAIRS) if i not in POISON and i % THINGS < 20]:
        said[row] = f"usual{row % THINGS // 7}"
    counts = np.sort(np.unique(said, return_counts=True)[1])[::-1]
    assert (counts[:3] > len(POISON)).all() and counts[3] == len(POISON) > np.quantile(counts, 0.95)
    features = replace(filled, captions=tuple(said))
    assert not disputes(features).caption[features.kinds[0].index(CLAIM)]


def test_a_crowd_has_one_voice(spread: PairFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    found = claims(spread)
    made = found.made.clone()
    made[POISON] = len(POISON)
    monkeypatch.setattr(module, "claims", lambda pairs: replace(found, made=made))
    assert not disputes(replace(spread)).word.any()


def test_seven_sevenths_are_not_more_than_one_and_of_nothing_nothing_is_unusual() -> None:
    voices = np.array([1.0] * 40 + [np.nextafter(1.0, 2.0)])
    assert not _unusual(voices, 0.95).any()
    assert _unusual(np.array([1.0] * 40 + [2.0]), 0.95).sum() == 1
    assert _unusual(np.array([0.0] * 1000 + [1.0] * 10 + [2.0]), 0.95).sum() == 1, "words nobody says are none"
    assert not _unusual(np.zeros(3), 0.95).any()


def test_captions_without_a_word_that_tells_them_apart_are_no_trouble(filled: PairFeatures) -> None:
    same = replace(filled, captions=("one and the same",) * PAIRS)
    assert np.isfinite(p_values(same)).all() and not disputes(same).word.any()


def test_what_lies_look_like_is_learned_from_p_values_that_are_uniform(filled: PairFeatures) -> None:
    assert _record(filled).mixture == fit_mixture(joined(filled))


def test_a_caption_the_reference_has_not_is_not_disputed(filled: PairFeatures) -> None:
    strangers = replace(filled, keys=tuple(f"new-{i}" for i in range(PAIRS)), reference=filled)
    under = called(filled, CLAIM)
    assert (p_values(strangers) > joined(strangers))[under].any()
    unknown = replace(strangers, captions=("never seen",) * PAIRS)
    np.testing.assert_array_equal(p_values(unknown), joined(unknown))
