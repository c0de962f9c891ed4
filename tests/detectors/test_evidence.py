"""The two groups: their fit on a mixture of known make-up, and the prior that each caption has of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import sparse

from otcclip.detectors import PairFeatures, lie_probability, make, p_values
from otcclip.detectors.evidence import Record, Ties, log_odds
from otcclip.detectors.mixture import Mixture, fit_mixture

Make = Callable[..., PairFeatures]


def test_the_fit_finds_what_was_mixed() -> None:
    rng = np.random.default_rng(0)
    honest = rng.random(40_000) ** (1 / 0.1)  # density a p^(a - 1) with a = .1
    mixture = fit_mixture(np.concatenate([honest, rng.random(10_000)]))
    # Storey counts the honest pairs above one half too: 1 - .5^.1 = 6.7 % of them, doubled.
    assert abs(mixture.share - (0.2 + 2 * 0.8 * (1 - 0.5**0.1))) < 0.01
    assert 0.09 < mixture.a < 0.16  # the floor at 1e-5 and the share taken high both draw it up
    pure = fit_mixture(rng.random(50_000) ** (1 / 0.3))
    assert pure.share > mixture.share and 0.2 < pure.a < 0.3


def test_posterior_is_bayes_rule() -> None:
    p, prior = np.array([1e-4, 0.01, 0.3, 1.0]), 0.25
    density = 0.2 * p ** (0.2 - 1)
    expected = prior / (prior + (1 - prior) * density)
    np.testing.assert_allclose(Mixture(0.1, 0.2).posterior(p, prior), expected)


def test_a_caption_answers_for_its_other_pairs(make_features: Make) -> None:
    """Settled: prior = (share + sum of the others' posteriors) / (1 + their number); posteriors by Bayes from it."""
    features = make_features(120, classes=20, wrong=(3, 23, 43, 63))
    p = p_values(features)
    mixture = fit_mixture(p)
    lie, odds = lie_probability(features), log_odds(features)
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i and features.captions[j] == features.captions[i]]
        prior = (mixture.share + sum(lie[j] for j in others)) / (1 + len(others))
        expected = mixture.posterior(p[i : i + 1], prior)[0]
        np.testing.assert_allclose(lie[i], expected, atol=1e-3)
    np.testing.assert_allclose(lie, 1 / (1 + np.exp(-odds)))
    np.testing.assert_array_equal(odds, make("caption-fdr").score(features))


def test_equal_evidence_weighs_more_under_a_caption_of_ill_repute() -> None:
    p = np.array([0.1] + [0.9] * 6 + [0.1] + [0.001] * 6 + [0.1])
    kind = np.array([0] * 7 + [1] * 7 + [2])
    mixture = Mixture(0.1, 0.2)
    lie = mixture.posterior(p, mixture.share)
    record = Record(mixture, lie, np.bincount(kind, lie), np.bincount(kind))
    odds = record.log_odds(p, Ties(kind, np.arange(15), sparse.csr_array((15, 15), dtype=bool)))
    bad, good, alone = odds[0], odds[7], odds[14]
    assert bad > alone > good
    np.testing.assert_allclose(alone, np.log(0.1 / 0.9) + mixture.log_ratio(p[14:])[0])


def test_pairs_outside_the_reference_are_judged_by_its_mixture(make_features: Make) -> None:
    reference = make_features(120, classes=20)
    twins = replace(reference, keys=tuple(f"new-{i}" for i in range(120)), reference=reference)
    unknown = replace(twins, captions=("never seen",) * 120)
    mixture = fit_mixture(p_values(reference))
    expected = np.log(mixture.share / (1 - mixture.share)) + mixture.log_ratio(p_values(unknown))
    np.testing.assert_allclose(log_odds(unknown), expected)
