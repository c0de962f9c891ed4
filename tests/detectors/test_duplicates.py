"""Duplicate images under conflicting captions, duplicate captions, and the ensemble, each by a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from otcclip.detectors import DETECTORS, PairFeatures, make
from otcclip.detectors.conflicting_captions import BITS
from otcclip.errors import UserError
from otcclip.evidence.captions import agreement_table

Make = Callable[..., PairFeatures]


def test_conflicts_by_a_loop(make_features: Make) -> None:
    features = make_features(30)
    sha = list(features.sha256)
    hashes = features.phash.copy()
    sha[5] = sha[1]  # one file
    hashes[9] = hashes[2] ^ np.uint64(0b101)  # two bits away: a copy
    hashes[10] = hashes[3] ^ np.uint64(0b1011)  # three: not
    hashes[12] = hashes[4]
    captions = list(features.captions)
    captions[12] = captions[4]  # a copy that says the same
    features = replace(features, sha256=tuple(sha), phash=hashes, captions=tuple(captions))
    words = features.agreement
    expected = np.zeros(30)
    for i in range(30):
        for j in range(30):
            differ = bin(int(hashes[i]) ^ int(hashes[j])).count("1")
            if i != j and (sha[i] == sha[j] or differ <= BITS) and captions[i] != captions[j]:
                agreed = agreement_table(words.marginals([captions[i]]), words.marginals([captions[j]]))
                expected[i] = max(expected[i], 1 - agreed[0, 0])
    score = make("conflicting-captions").score(features)
    np.testing.assert_allclose(score, expected, atol=1e-6)
    assert set(np.flatnonzero(score)) == {1, 5, 2, 9}


def test_the_same_pair_in_the_reference_is_no_conflict(make_features: Make) -> None:
    reference = make_features(20)
    features = replace(reference, captions=("other words",) * 20, reference=reference)
    assert not make("conflicting-captions").score(features).any()


def test_duplicate_captions_are_counted_without_self(make_features: Make) -> None:
    reference = replace(make_features(6), captions=("A cat", "a  cat", "a dog", "a cat", "a cow", "a dog"))
    np.testing.assert_allclose(make("duplicate-captions").score(reference), np.log1p([2, 2, 1, 2, 0, 1]))
    stranger = replace(reference, keys=tuple("uvwxyz"), reference=reference)
    np.testing.assert_allclose(make("duplicate-captions").score(stranger), np.log1p([3, 3, 2, 3, 1, 2]))


def test_the_ensemble_is_the_mean_of_rank_shares(make_features: Make) -> None:
    features = make_features(200, classes=20, wrong=(3, 11), noise=1.2)
    shares = []
    for name in ("neighbour-ot", "claim-left-out", "own-rank"):
        score = make(name).score(features)
        shares.append([((score < s).sum() + (score <= s).sum()) / 400 for s in score])
    score = make("ensemble").score(features)
    np.testing.assert_allclose(score, np.mean(shares, axis=0))
    assert set(np.argsort(-score)[:2]) == {3, 11}


def test_the_ensemble_leaves_out_what_the_encoder_cannot_serve(make_features: Make) -> None:
    features = replace(make_features(40, wrong=(3,)), joint=False, local=False)
    members = (make("neighbour-ot"), make("claim-left-out"))
    np.testing.assert_array_equal(make("ensemble").score(features), make("ensemble", members=members).score(features))


def test_unknown_detector_is_one_line() -> None:
    with pytest.raises(UserError, match=r"unknown detector 'doa'; did you mean 'dao'"):
        make("doa")
    assert len(DETECTORS) == 15
