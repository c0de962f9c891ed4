"""d against every caption of the pool, by a loop; OT-distance and own-rank read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from otcclip.detectors import PairFeatures, make, match, pool
from otcclip.evidence.captions import agreement_table
from otcclip.evidence.copies import LIKE
from otcclip.evidence.matching import EPSILON, ITERATIONS
from otcclip.transport import pair_costs

Make = Callable[..., PairFeatures]


def distances(features: PairFeatures) -> np.ndarray:
    """d of every pair's image to every distinct caption of the reference."""
    against = features.against
    out = np.zeros((len(features), len(against.kinds[0])))
    for c, caption in enumerate(against.kinds[0]):
        j = against.captions.index(caption)
        tokens = against.text.local.take(torch.full((len(features),), j))
        cost = pair_costs(features.image.local, tokens, epsilon=EPSILON, iterations=ITERATIONS).value
        out[:, c] = 0.5 * (1 - features.image.pooled @ against.text.pooled[j]) + 0.5 * cost
    return out


def check(features: PairFeatures) -> None:
    d, found = distances(features), match(features)
    kinds = features.against.kinds[0]
    words = features.against.agreement
    like = agreement_table(words.marginals(features.captions), words.marginals(kinds)) >= LIKE
    assert like.any() and not like.all()
    assert pool(features).first.tolist() == [features.against.captions.index(caption) for caption in kinds]
    for i, caption in enumerate(features.captions):
        own = found.own_distance[i].item()
        others = [c for c in range(len(kinds)) if kinds[c] != caption]
        best, second = sorted((c for c in others if not like[i, c]), key=lambda c: d[i, c])[:2]
        assert found.best[i] == best
        np.testing.assert_allclose(found.best_distance[i], d[i, best], atol=1e-5)
        np.testing.assert_allclose(found.margin[i], d[i, second] - d[i, best], atol=1e-5)
        nearer = sum(d[i, c] < own - 1e-6 for c in others)
        np.testing.assert_allclose(found.own_share[i], (nearer + 0.5) / len(kinds), atol=1e-6)
        if caption in kinds:
            np.testing.assert_allclose(own, d[i, kinds.index(caption)], atol=1e-5)


def test_against_a_loop(make_features: Make) -> None:
    check(make_features(24, wrong=(3, 8)))


def test_a_pair_outside_the_reference_is_ranked_among_the_same_captions(make_features: Make) -> None:
    reference = make_features(24)
    strangers = reference.take(torch.arange(10))
    check(replace(strangers, keys=tuple(f"new-{i}" for i in range(10)), reference=reference))


def test_wrong_captions_rank_last(make_features: Make) -> None:
    wrong = (3, 8, 21)
    features = make_features(32, wrong=wrong)
    for name in ("ot-distance", "own-rank", "clip-score"):
        assert set(np.argsort(-make(name).score(features))[:3]) == set(wrong), name


def test_without_tokens_d_is_the_cosine(make_features: Make) -> None:
    features = replace(make_features(24), local=False)
    found = match(features)
    assert found.own_ot.isnan().all()
    np.testing.assert_allclose(found.own_distance, make("clip-score").score(features), atol=1e-6)


def test_a_pool_of_one_caption_nominates_nothing(make_features: Make) -> None:
    features = replace(make_features(4), captions=("one",) * 4)
    found = match(features)
    assert found.best_distance.isinf().all() and (found.margin == 0).all()
