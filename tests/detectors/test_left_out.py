"""The map that never heard the claim: by fitting it again, and what is left out, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.data.keys import hash_keys
from otcclip.detectors import PairFeatures, claims, make
from otcclip.detectors import left_out as module
from otcclip.detectors.left_out import JITTER, RIDGE, WIDTH, _fit, _group, _predicted, left_out
from otcclip.evidence.captions import agreement_table
from otcclip.evidence.copies import LIKE
from otcclip.models import Features

Make = Callable[..., PairFeatures]


@pytest.fixture(scope="module")
def kin(make_features: Make) -> PairFeatures:
    """240 pairs of 24 things of four kinds; things of a kind have images alike and caption vectors alike, and no word
    in common, so that no claim is like another."""
    draw = torch.Generator().manual_seed(1)
    thing = torch.arange(240) % 24
    kinds, things = (F.normalize(torch.randn(n, 24, generator=draw), dim=1) for n in (4, 24))
    image = F.normalize(kinds[thing % 4] + 0.5 * things[thing] + 0.12 * torch.randn(240, 24, generator=draw), dim=1)
    text = F.normalize(kinds[thing % 4].roll(1, dims=1) + 0.4 * things[thing].roll(1, dims=1), dim=1)
    base = make_features(240)
    said = tuple(f"thing{int(t)}" for t in thing)
    return replace(
        base, captions=said, image=Features(image, base.image.local), text=Features(text, base.text.local), joint=False
    )


def lying(features: PairFeatures, rows: list[int], like: int) -> PairFeatures:
    """The pairs `rows` say what pair `like` says."""
    said, text = list(features.captions), features.text.pooled.clone()
    for row in rows:
        said[row], text[row] = said[like], text[like]
    return replace(features, captions=tuple(said), text=Features(text, features.text.local))


def fitted_again(features: PairFeatures) -> np.ndarray:
    """`[n, t]` by hand in float64: for each pair kernel features of those that stay, and a ridge regression on them."""
    against = features.against
    distinct, kind = against.kinds
    first = [against.captions.index(caption) for caption in distinct]
    image, text = against.image.pooled.double(), against.text.pooled.double()
    middle, target = image.mean(0), (text - text[first].mean(0)).numpy()
    there, here = (F.normalize(x.image.pooled.double() - middle, dim=1).numpy() for x in (against, features))
    landmarks = there[np.argsort(hash_keys(against.keys), kind="stable")[: module.LANDMARKS]]

    def kernel(a: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.exp((a @ landmarks.T - 1) / WIDTH)
        return found

    root = np.linalg.cholesky(kernel(landmarks) + JITTER * np.eye(len(landmarks)))
    seen, asked = (np.linalg.solve(root, kernel(x).T).T for x in (there, here))
    agreed = agreement_table(features.words, against.agreement.marginals(distinct))[:, kind]
    silent = claims(features).silent_to_encoder.toarray()
    out = []
    for i in range(len(features)):
        same = np.array([caption == features.captions[i] for caption in against.captions])
        stay = (agreed[i] < LIKE) & ~silent[i] & ~same
        gram = seen[stay].T @ seen[stay] + RIDGE * np.eye(len(landmarks))
        out.append(asked[i] @ np.linalg.solve(gram, seen[stay].T @ target[stay]))
    return np.stack(out)


def predicted(features: PairFeatures) -> np.ndarray:
    return _predicted(features, torch.arange(len(features)), _fit(features.against)).numpy()


def test_leaving_out_is_fitting_again(kin: PairFeatures) -> None:
    np.testing.assert_allclose(predicted(kin), fitted_again(kin), atol=2e-4)


def test_leaving_out_is_fitting_again_with_fewer_landmarks(kin: PairFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LANDMARKS", 30)
    features = replace(kin, joint=False)  # anew: what was computed is kept
    np.testing.assert_allclose(predicted(features), fitted_again(features), atol=2e-4)


def test_leaving_out_is_fitting_again_apart_from_the_reference(kin: PairFeatures, make_features: Make) -> None:
    rows = torch.arange(7, 47)
    part = kin.take(rows)
    features = replace(part, keys=tuple(f"new-{i}" for i in range(40)), reference=kin)
    strange = replace(features, captions=(*features.captions[:-1], "never seen"))
    np.testing.assert_allclose(predicted(strange), fitted_again(strange), atol=2e-4)


def test_the_share_is_of_captions_at_least_as_near(kin: PairFeatures) -> None:
    captions = kin.text.pooled[[kin.captions.index(caption) for caption in kin.kinds[0]]].double()
    text = captions - captions.mean(0)
    near = F.normalize(torch.from_numpy(fitted_again(kin)), dim=1) @ F.normalize(text, dim=1).T
    own = near[torch.arange(240), torch.from_numpy(kin.kinds[1])][:, None]
    share = ((near > own + 1e-6).sum(1) + 0.5 * ((near - own).abs() <= 1e-6).sum(1) + 0.5) / 24
    np.testing.assert_allclose(left_out(kin).own, share.clamp(max=1), atol=1e-6)
    np.testing.assert_array_equal(make("claim-left-out").score(kin), left_out(kin).own)


def test_a_true_caption_is_borne_out_by_its_kin_and_a_false_one_is_not(kin: PairFeatures) -> None:
    wrong = list(range(0, 240, 17))
    own = left_out(lying(kin, wrong, 2)).own
    right = [i for i in range(240) if i not in wrong and i % 24 != 2]
    assert own[right].median() < 0.2  # a kind is a quarter of things: less than that is all that may be known
    assert own[[i for i in wrong if i % 4 != 2]].median() > 0.4


def test_nobody_is_borne_out_by_those_who_say_the_same(kin: PairFeatures) -> None:
    """Whatever vectors a claim's own captions have, what is predicted for its pairs stays."""
    rows = [i for i in range(240) if i % 24 == 5]
    text = kin.text.pooled.clone()
    text[rows] = -text[rows]
    changed = replace(kin, text=Features(text, kin.text.local))
    own, other = (F.normalize(torch.from_numpy(predicted(x)), dim=1)[rows] for x in (kin, changed))
    # The mean caption moves by two twenty-fourths of the claim's, and nothing else does.
    assert (own * other).sum(1).min() > 0.97
    anew = fitted_again(changed)
    np.testing.assert_allclose(predicted(changed), anew, atol=2e-4)


def test_copies_of_an_image_have_no_say_whatever_they_are_called(kin: PairFeatures) -> None:
    """Twenty near-duplicates of image 0 under names of another kind: what is said of it is what was said without."""
    copies = list(range(1, 240, 12))
    image = kin.image.pooled.clone()
    image[copies] = F.normalize(image[0] + 0.02 * image[copies], dim=1)
    local = torch.stack([kin.image.local[i] for i in range(240)])
    local[copies] = local[0].clone()
    features = replace(kin, image=Features(image, type(kin.image.local).from_dense(local)))
    assert set(copies) <= set(claims(features).silent_to_encoder[[0]].indices)
    np.testing.assert_allclose(predicted(features)[0], fitted_again(features)[0], atol=2e-4)


def test_a_claim_without_a_word_is_left_out_too(kin: PairFeatures) -> None:
    """What is written in no letters agrees with nothing, not with itself either."""
    said = tuple("!?" if i % 10 == 3 else caption for i, caption in enumerate(kin.captions))
    features = replace(kin, captions=said)
    np.testing.assert_allclose(predicted(features), fitted_again(features), atol=2e-4)


def test_where_everybody_makes_one_claim_nobody_knows(kin: PairFeatures) -> None:
    own = left_out(lying(kin, list(range(240)), 0)).own
    assert torch.isfinite(own).all() and (own >= 0.5).all()


def test_who_makes_the_claim_is_left_out_however_many_they_are(
    kin: PairFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are landmarks: by another identity, to the same end."""
    monkeypatch.setattr(module, "LANDMARKS", 25)
    features = lying(kin, [i for i in range(240) if i % 4 != 1], 0)
    assert len(_group(np.array([1.0] + [0.0] * 6, np.float32), _fit(features))) == 180
    found = predicted(features)
    np.testing.assert_allclose(found, fitted_again(features), atol=2e-4)
    assert np.abs(found).max() > 0.05


def test_of_a_placeholder_under_many_claims_some_are_left_out(
    kin: PairFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many: what is left out of it costs what it costs for others."""
    image, local = kin.image.pooled.clone(), torch.stack([kin.image.local[i] for i in range(240)])
    image[:60], local[:60] = image[0].clone(), local[0].clone()
    features = replace(kin, image=Features(image, type(kin.image.local).from_dense(local)))
    asked: list[int] = []
    real = module._Fit.without
    monkeypatch.setattr(module._Fit, "without", lambda fit, group, x: asked.append(len(group)) or real(fit, group, x))
    monkeypatch.setattr(module, "TWINS", 7)
    predicted(features)
    assert max(asked) == 10 + 7
    monkeypatch.setattr(module, "TWINS", 256)
    predicted(replace(features))
    assert max(asked) >= 60


def test_the_order_of_the_reference_does_not_matter(kin: PairFeatures) -> None:
    order = torch.randperm(240, generator=torch.Generator().manual_seed(2))
    turned = replace(kin.take(order), reference=None)
    np.testing.assert_allclose(left_out(turned).own, left_out(kin).own[order], atol=0.03)
