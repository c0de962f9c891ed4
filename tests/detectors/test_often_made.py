"""A claim made unusually often, by who owns the look-alikes: every sound witness must bear it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures, claims, lie_probability, p_values
from otcclip.detectors.evidence import _joined, _often_made, _record, _witnesses, best_of, fit_mixture
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


def test_the_worst_sound_witness_counts_and_only_for_claims_often_made(filled: PairFeatures) -> None:
    seen, ranked = _witnesses(filled).numpy()
    assert np.median(seen) <= 0.05 and np.median(ranked) <= 0.05
    often = np.array([caption == CLAIM for caption in filled.captions])
    np.testing.assert_array_equal(_often_made(filled), often)
    made = p_values(filled)
    np.testing.assert_array_equal(made[~often], _joined(filled)[~often])
    worst = best_of(np.maximum(seen, ranked), claims(filled).made.numpy())
    np.testing.assert_allclose(made[often], np.maximum(_joined(filled), worst)[often], rtol=1e-6)


def test_a_witness_that_the_enemy_owns_no_longer_outvotes_the_other(filled: PairFeatures) -> None:
    seen, ranked = _witnesses(filled).numpy()
    assert np.median(seen[POISON]) < 0.05 < np.median(ranked[POISON])
    assert np.median(_joined(filled)[POISON]) < np.median(p_values(filled)[POISON])
    assert np.median(lie_probability(filled)[POISON]) > 0.5


def test_a_witness_that_bears_out_hardly_anybody_is_not_asked(filled: PairFeatures) -> None:
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(0))
    tokens = [filled.text.local[i] for i in order.tolist()]
    deaf = replace(filled, text=Features(filled.text.pooled[order], FeatureSets.from_list(tokens)))
    seen, ranked = _witnesses(deaf).numpy()
    assert np.median(seen) <= 0.05 < np.median(ranked)
    often, worst = _often_made(deaf), best_of(seen, claims(deaf).made.numpy())
    np.testing.assert_allclose(p_values(deaf)[often], np.maximum(_joined(deaf), worst)[often], rtol=1e-6)


def test_what_lies_look_like_is_learned_from_p_values_that_are_uniform(filled: PairFeatures) -> None:
    assert _record(filled).mixture == fit_mixture(_joined(filled))


def test_a_caption_the_reference_has_not_is_not_often_made(filled: PairFeatures) -> None:
    strangers = replace(filled, keys=tuple(f"new-{i}" for i in range(PAIRS)), reference=filled)
    assert _often_made(strangers).sum() == _often_made(filled).sum()
    assert not _often_made(replace(strangers, captions=("never seen",) * PAIRS)).any()
