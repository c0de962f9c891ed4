"""The vote: by a loop; and the rules that keep an enemy from voting for himself, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures, claims, look_alikes, make
from otcclip.detectors.look_alikes import NEIGHBOURS, SHARPNESS
from otcclip.detectors.views import encoder_views, grid_side, windows
from otcclip.evidence.captions import agreement_table
from otcclip.evidence.copies import LIKE
from otcclip.evidence.neighbours import NEAR_DUPLICATE
from otcclip.models import Features
from otcclip.transport import FeatureSets

Make = Callable[..., PairFeatures]


def loop(features: PairFeatures) -> np.ndarray:
    """`own` by hand: every view, every pair, every caption asked about."""
    against = features.against
    distinct, kind = against.kinds
    words = against.agreement
    table = agreement_table(words.marginals(distinct), words.marginals(distinct))
    mine = agreement_table(words.marginals(features.captions), words.marginals(distinct))
    counts = np.bincount(kind)
    own = features.self_index.tolist()
    queries, voters = encoder_views(features).float(), encoder_views(against).float()
    shares = []
    for view in range(len(queries)):
        row = []
        for i in range(len(features)):
            whole = (queries[0, i].bfloat16() @ voters[0].bfloat16().T).float().numpy()
            cosine = (queries[view, i].bfloat16() @ voters[view].bfloat16().T).float().numpy()
            allowed = [j for j in range(len(against)) if j != own[i] and whole[j] <= NEAR_DUPLICATE]
            near = sorted(allowed, key=lambda j: -cosine[j])[:NEIGHBOURS]
            raw = np.exp(cosine[near] / SHARPNESS)
            weight = raw / raw.sum() / counts[kind[near]]
            liked = sum(w * table[kind[j]] for w, j in zip(weight, near, strict=True))
            asked = sum(w * mine[i, kind[j]] for w, j in zip(weight, near, strict=True))
            better, equal = (liked > asked + 1e-6).sum(), (abs(liked - asked) <= 1e-6).sum()
            row.append(min(1.0, (better + (equal + 1) / 2) / len(distinct)))
        shares.append(row)
    return np.exp(np.log(shares).mean(axis=0))


def test_against_a_loop(make_features: Make) -> None:
    features = make_features(60, wrong=(3, 17))
    np.testing.assert_allclose(look_alikes(features).own, loop(features), atol=0.02)


def test_against_a_loop_apart_from_the_reference(make_features: Make) -> None:
    features = make_features(12, seed=4, prefix="new", reference=make_features(60))
    np.testing.assert_allclose(look_alikes(features).own, loop(features), atol=0.02)


def test_wrong_captions_are_found_and_the_right_ones_nominated(make_features: Make) -> None:
    wrong = (3, 17, 40)
    features = replace(make_features(400, classes=20, wrong=wrong, noise=1.2), joint=False)
    assert set(np.argsort(-make("neighbour-ot").score(features))[:3]) == set(wrong)
    seen = look_alikes(features)
    for row in wrong:
        nominee = features.kinds[0][int(seen.nominee[row])]
        assert nominee.split()[0] == f"thing{row % 20}" and seen.nominee_share[row] < 0.1


def test_unrelated_captions_have_uniform_shares(make_features: Make) -> None:
    features = make_features(400, classes=40)
    shuffled = np.random.default_rng(0).permutation(len(features))
    mixed = replace(features, captions=tuple(features.captions[i] for i in shuffled), joint=False)
    share = np.sort(look_alikes(mixed).own.numpy())
    assert abs(np.median(share) - 0.5) < 0.12
    for level in (0.05, 0.1, 0.2):
        assert (share <= level).mean() < 2 * level + 0.03


def copied(features: PairFeatures, rows: list[int], source: int, caption: str) -> PairFeatures:
    """Rows become copies of one image, under one caption."""
    cells = features.image.local.values.view(len(features), 9, -1).clone()
    pooled = features.image.pooled.clone()
    cells[rows], pooled[rows] = cells[source].clone(), pooled[source].clone()
    captions = tuple(caption if i in rows else c for i, c in enumerate(features.captions))
    return replace(features, captions=captions, image=Features(pooled, FeatureSets.from_dense(cells)), joint=False)


def test_copies_do_not_vouch_for_each_other_and_are_counted(make_features: Make) -> None:
    rows = [0, 8, 16, 24]
    features = copied(make_features(64, noise=1.5), rows, 0, "thing4 of kind1 no0")
    seen = look_alikes(features)
    assert claims(features).made[rows].tolist() == [4] * 4 and claims(features).made[1] == 1
    assert (seen.own[rows] > 0.1).all()
    score = make("neighbour-ot").score(features)
    np.testing.assert_allclose(score[rows], 4 * seen.own[rows].double())


def test_a_pair_outside_the_reference_counts_itself(make_features: Make) -> None:
    reference = make_features(40)
    stranger = replace(reference, keys=tuple(f"new-{i}" for i in range(40)), reference=reference)
    assert (claims(stranger).made >= 2).all()  # its twin in the reference, and itself


def test_windows_cover_every_cell_and_weigh_the_rest_evenly() -> None:
    for side in (3, 4, 7):
        masks = windows(side)
        removed = torch.stack([mask == 0 for mask in masks[1:]])
        assert removed.any(dim=0).all() and len(masks) == 10
        assert all(torch.isclose(mask.sum(), torch.tensor(1.0)) for mask in masks)
        assert all(len(mask[mask > 0].unique()) == 1 for mask in masks)


def test_sets_that_are_no_grid_have_one_view(make_features: Make) -> None:
    features = make_features(12)
    sets = FeatureSets.from_list([F.normalize(torch.rand(5 + i % 2, 24), dim=1) for i in range(12)])
    assert grid_side(sets) == 0 and grid_side(features.image.local) == 3
    odd = replace(features, image=Features(features.image.pooled, sets))
    assert len(encoder_views(odd)) == 1 and len(encoder_views(features)) == 10


def test_a_nominee_says_something_else(make_features: Make) -> None:
    features = replace(make_features(60, wrong=(3, 17)), joint=False)
    named = [features.kinds[0][i] for i in look_alikes(features).nominee.tolist()]
    agreed = agreement_table(features.words, features.agreement.marginals(named)).diagonal()
    assert (agreed < LIKE).all()
