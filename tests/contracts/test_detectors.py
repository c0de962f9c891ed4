"""The contract of every detector: those in the registry and a toy defined here pass the same tests."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip import registry
from otcclip.detectors import DETECTORS, Detector, PairFeatures, Scores, applies
from otcclip.models import Features
from otcclip.transport import FeatureSets


class Toy:
    """Short captions are suspicious: a newcomer's one file."""

    name: ClassVar[str] = "toy"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        return -np.array([len(caption) for caption in features.captions], np.float64)


FAMILY = registry.registry("detector", (*DETECTORS.values(), Toy))


def pairs(n: int, seed: int, prefix: str, reference: PairFeatures | None = None) -> PairFeatures:
    draw = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=draw), dim=-1)

    tokens = FeatureSets.from_list([unit(2 + i % 3, 16) for i in range(n)])
    # Written as half precision to disk, read as such.
    patches = FeatureSets.from_dense(unit(n, 9, 16)).to(torch.float16)
    return PairFeatures(
        tuple(f"{prefix}{i}" for i in range(n)),
        tuple(f"word{i % 7} and word{i % 5} <script>" for i in range(n)),
        Features(unit(n, 16), patches),
        Features(unit(n, 16), tokens),
        tuple(f"{i % 11:064x}" for i in range(n)),
        np.random.default_rng(seed).integers(0, 2**63, n, dtype=np.uint64),
        pictures(n),
        reference=reference,
    )


def pictures(n: int) -> torch.Tensor:
    """Six pictures, moved by some pixels: crowds and near-duplicates."""
    base = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    large = (F.interpolate(base, size=(64, 64), mode="bilinear") * 255).to(torch.uint8)
    return torch.stack([large[i % 6].roll((i // 6 % 4, i // 24 * 3), dims=(1, 2)) for i in range(n)])


@pytest.fixture(scope="module")
def reference() -> PairFeatures:
    return pairs(40, 0, "ref")


@pytest.fixture(params=FAMILY)
def detector(request: pytest.FixtureRequest) -> Detector:
    made: Detector = registry.make("detector", FAMILY, request.param)
    return made


def test_is_a_detector(detector: Detector) -> None:
    assert isinstance(detector, Detector)
    assert FAMILY[detector.name] is type(detector)
    assert isinstance(detector.comparable, bool) and set(detector.needs) <= {"joint", "local", "pictures"}
    assert (type(detector).__doc__ and type(detector).score.__doc__) or detector.name == "toy"


def test_scores_are_finite_float64_one_a_pair(detector: Detector, reference: PairFeatures) -> None:
    for features in (reference, pairs(9, 1, "new", reference), pairs(1, 2, "one", reference)):
        score = detector.score(features)
        assert score.shape == (len(features),) and score.dtype == np.float64 and np.isfinite(score).all()


def test_a_score_depends_on_the_pair_and_the_reference_alone(detector: Detector, reference: PairFeatures) -> None:
    """Neither the shard a pair stands in nor its place there matters: self is found by key."""
    whole = detector.score(replace(reference, reference=reference))
    alone = detector.score(reference)
    np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    part = order[:13]
    np.testing.assert_allclose(detector.score(reference.take(part)), alone[part.numpy()], rtol=1e-4, atol=1e-5)


def test_scoring_changes_nothing(detector: Detector) -> None:
    features = pairs(20, 4, "x")
    before = (features.image.pooled.clone(), features.text.pooled.clone(), features.image.local.values.clone())
    first = detector.score(features)
    after = (features.image.pooled, features.text.pooled, features.image.local.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    np.testing.assert_array_equal(first, detector.score(pairs(20, 4, "x")))


def test_says_when_the_encoder_cannot_serve_it(detector: Detector, reference: PairFeatures) -> None:
    separate = replace(reference, joint=False, local=False, pictures=None)
    assert applies(detector, separate) == (not detector.needs)
    assert applies(detector, reference)
    if applies(detector, separate):
        assert np.isfinite(detector.score(separate)).all()


def test_a_name_registered_twice_raises() -> None:
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        registry.registry("detector", (*FAMILY.values(), Toy))
