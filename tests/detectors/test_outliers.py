"""k-dist, SLOF, LID and DAO against a loop over all pairs; CLIP-score and the mixture against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from otcclip.detectors import PairFeatures, make
from otcclip.detectors.lid import MOST, lid

K = 5
Make = Callable[..., PairFeatures]


def knn(query: np.ndarray, pool: np.ndarray, own: int) -> tuple[np.ndarray, np.ndarray]:
    distance = np.array([np.linalg.norm(query - other) if j != own else np.inf for j, other in enumerate(pool)])
    order = np.argsort(distance, kind="stable")[:K]
    return distance[order], order


def brute(features: PairFeatures, name: str) -> np.ndarray:
    pool = features.against.image.pooled.double().numpy()
    own = features.self_index.tolist()
    near = [knn(q, pool, own[i]) for i, q in enumerate(features.image.pooled.double().numpy())]
    among = [knn(q, pool, j) for j, q in enumerate(pool)]

    def dimension(d: np.ndarray) -> float:
        return -K / np.log(d / d[-1]).sum()

    if name == "k-dist":
        return np.array([d[-1] for d, _ in near])
    if name == "slof":
        return np.array([np.mean([d[-1] / among[o][0][-1] for o in index]) for d, index in near])
    if name == "lid":
        return np.array([dimension(d) for d, _ in near])
    terms = [[dimension(among[o][0]) * np.log(d[-1] / among[o][0][-1]) for o in index] for d, index in near]
    return np.array([np.mean(t) for t in terms])


@pytest.mark.parametrize("name", ["k-dist", "slof", "lid", "dao"])
@pytest.mark.parametrize("apart", [False, True])
def test_against_a_loop(name: str, apart: bool, make_features: Make) -> None:
    features = make_features(40)
    if apart:  # half of the pairs are in the reference, half are strangers to it
        features = make_features(40, seed=1, prefix="pair", reference=make_features(20, seed=1))
        assert (features.self_index >= 0).sum() == 20
    np.testing.assert_allclose(make(name, k=K).score(features), brute(features, name), rtol=1e-4, atol=1e-6)


def test_an_outlier_is_found(make_features: Make) -> None:
    features = make_features(48, noise=0.05)
    features.image.pooled[7] = -features.image.pooled.mean(0) / features.image.pooled.mean(0).norm()
    for name in ("k-dist", "slof", "dao"):
        assert make(name, k=4).score(features).argmax() == 7


def test_copies_have_no_dimension_and_equal_distances_no_end() -> None:
    distance = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.5]])
    none, endless, some = lid(distance).tolist()
    assert none == 0 and endless == MOST and 0 < some < 1


def test_more_copies_than_neighbours_stay_finite(make_features: Make) -> None:
    features = make_features(30)
    features.image.pooled[:] = features.image.pooled[0].clone()
    for name in ("k-dist", "slof", "lid", "dao"):
        assert np.isfinite(make(name, k=K).score(features)).all()


def test_clip_score_is_one_minus_cosine(make_features: Make) -> None:
    features = make_features(20)
    expected = [1 - float(features.image.pooled[i] @ features.text.pooled[i]) for i in range(20)]
    np.testing.assert_allclose(make("clip-score").score(features), expected, atol=1e-6)


def test_gmm_is_the_posterior_and_falls_with_the_cosine(make_features: Make) -> None:
    features = make_features(80, wrong=tuple(range(0, 80, 5)))
    score = make("gmm").score(features)
    cosine = (features.image.pooled * features.text.pooled).sum(1).double().numpy()
    order = np.argsort(cosine)
    assert (np.diff(score[order]) <= 1e-9).all()
    mixture = GaussianMixture(2, random_state=0, reg_covar=1e-6).fit(cosine[:, None])
    low, high = np.sort(mixture.means_[:, 0])
    posterior = mixture.predict_proba(cosine[:, None])[:, int(np.argmin(mixture.means_[:, 0]))]
    between = (cosine > low) & (cosine < high)
    np.testing.assert_allclose(1 / (1 + np.exp(-score[between])), posterior[between], atol=1e-6)
    assert set(np.argsort(-score)[:16]) == set(range(0, 80, 5))
