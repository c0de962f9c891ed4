"""Who makes the same claim, and what looks alike: against a fixed reference, by pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures, claims, make, p_values
from otcclip.detectors import witnesses as module
from otcclip.detectors.claims import _ties
from otcclip.detectors.evidence import Ties, _record, log_odds
from otcclip.detectors.left_out import left_out
from otcclip.detectors.look_alikes import look_alikes, untrained_vote
from otcclip.detectors.matching import match
from otcclip.detectors.poll import electorate
from otcclip.detectors.witnesses import CERTAIN, SOUND, best_of, disputed, witnesses
from otcclip.evidence.votes import combined_p

Make = Callable[..., PairFeatures]
CLASSES = 12


def drawings(kinds: torch.Tensor, seed: int, noise: float = 0.45) -> torch.Tensor:
    """`[n, 3, 64, 64]` uint8: one scene a kind, each time drawn a little differently."""
    rng = torch.Generator().manual_seed(seed)
    scenes = torch.rand(int(kinds.max()) + 1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    mixed = (1 - noise) * scenes[kinds] + noise * torch.rand(len(kinds), 3, 8, 8, generator=rng)
    return (F.interpolate(mixed, size=(64, 64), mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def honest(make_features: Make) -> PairFeatures:
    """120 pairs of twelve things, each thing's pictures alike."""
    return replace(make_features(120, classes=CLASSES, noise=1.5), pictures=drawings(torch.arange(120) % CLASSES, 1))


def crowd(features: PairFeatures, rows: list[int], captions: list[str]) -> PairFeatures:
    """The pictures of `rows` become one picture, moved; their captions become `captions`."""
    assert features.pictures is not None
    pictures = features.pictures.clone()
    one = drawings(torch.tensor([40]), 3)[0]
    for place, row in enumerate(rows):
        pictures[row] = one.roll((2 * (place % 3) - 2, 2 * (place // 3) - 2), dims=(1, 2))
    said = list(features.captions)
    for row, caption in zip(rows, captions, strict=True):
        said[row] = caption
    return replace(features, pictures=pictures, captions=tuple(said))


def test_altered_copies_with_like_claims_are_a_crowd(honest: PairFeatures) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    found = claims(crowd(honest, rows, [f"violin concert{i}" for i in range(7)]))
    assert found.crowded[rows].all() and found.made[rows].tolist() == [7] * 7
    for row in rows:
        assert set(found.crowd[[row]].indices) == set(rows) - {row}
        assert set(found.silent[[row]].indices) >= set(rows)
    others = [i for i in range(120) if i not in rows]
    assert not found.crowded[others].any()
    assert not set(found.crowd[others].indices)


def test_the_same_copies_under_unlike_claims_are_none(honest: PairFeatures) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    found = claims(crowd(honest, rows, [f"word{i} other{i}" for i in range(7)]))
    assert not found.crowded.any()


def test_a_copy_that_is_not_in_the_reference_is_told_by_itself(honest: PairFeatures) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    full = crowd(honest, rows, [f"violin concert{i}" for i in range(7)])
    inside = torch.tensor([i for i in range(120) if i != 78])
    against = replace(full.take(inside), reference=None)
    alone = claims(replace(full.take(torch.tensor([78, 1])), reference=against))
    assert alone.crowded.tolist() == [True, False] and alone.made.tolist()[0] == 7
    assert [against.keys[j] for j in alone.crowd[[0]].indices] == [full.keys[i] for i in rows[:-1]]


def test_who_says_it_in_other_words_and_lies_on_the_crowd_is_of_it(honest: PairFeatures) -> None:
    """The last copy's caption is no like claim but has the crowd's word: it and the crowd have no vote on each other.
    A near-duplicate of one that has the word is of it too; one that has not is not."""
    rows, other, near, stranger = [0, 13, 26, 39, 52, 65, 78], 91, 104, 117
    filler = " ".join(f"filler{i}" for i in range(4))
    captions = [*(f"violin concert{i}" for i in range(7)), *[f"violin {filler}"] * 2, "stranger"]
    full = crowd(honest, [*rows, other, near, stranger], captions)
    assert full.pictures is not None
    full.pictures[[near, stranger]] = full.pictures[0].clone()
    found = claims(full)
    assert found.crowded[rows].all() and not found.crowded[[other, near, stranger]].any()
    for row in (*rows, other, near):
        of_crowd = set(found.crowd[[row]].indices)
        assert of_crowd == {*rows, other, near} - {row}
        assert set(found.silent[[row]].indices) >= of_crowd | {row}
    shows = _ties(full)[1][[near]].indices
    assert 0 in shows and stranger not in shows, "a near-duplicate needs no laying over, but the word"
    assert not set(found.crowd[[stranger]].indices)
    assert stranger not in set(found.crowd.indices)

    inside = torch.tensor([i for i in range(120) if i != other])
    against = replace(full.take(inside), reference=None)
    alone = claims(replace(full.take(torch.tensor([other])), reference=against))
    assert {against.keys[j] for j in alone.crowd.indices} == {full.keys[i] for i in (*rows, near)}


def test_what_looks_alike_bears_out_true_captions_and_no_false_ones(honest: PairFeatures) -> None:
    wrong = [3, 40, 77]
    said = list(honest.captions)
    for row in wrong:
        said[row] = honest.captions[(row + 5) % 120]
    own = untrained_vote(replace(honest, captions=tuple(said))).own
    right = [i for i in range(120) if i not in wrong]
    assert own[wrong].min() > 0.3 and own[right].median() < 0.2
    score = make("untrained-neighbour").score(honest)
    np.testing.assert_allclose(score, untrained_vote(honest).own.double() * claims(honest).made)


def test_without_pictures_nobody_looks(make_features: Make) -> None:
    features = make_features(30)
    with pytest.raises(ValueError, match="without pictures"):
        untrained_vote(features)
    with pytest.raises(ValueError, match="of neither"):
        replace(features, pictures=drawings(torch.arange(30) % 8, 1), reference=make_features(30))
    assert not claims(features).crowded.any() and np.isfinite(log_odds(features)).all()


def test_witnesses_are_joined_by_fisher_and_claims_often_made_are_the_best_of_some_draws(honest: PairFeatures) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    features = crowd(honest, rows, [f"violin concert{i}" for i in range(7)])
    asked = (look_alikes(features).own, untrained_vote(features).own, left_out(features).own, match(features).own_share)
    found = claims(features)
    assert not disputed(features).any()
    for i in (*rows[:2], 1, 2):
        shares = [said[i].double() for said in (asked[:3] if i in rows else asked)]
        p = float(combined_p(*(share[None] for share in shares)))
        expected = 1 - (1 - min(p, CERTAIN)) ** int(found.made[i]) ** 0.5
        np.testing.assert_allclose(p_values(features)[i], expected, rtol=1e-6)


def test_what_looks_alike_is_asked_about_the_nominee_too(honest: PairFeatures) -> None:
    """As of a pair that carries it."""
    nominee, place = look_alikes(honest).nominee, untrained_vote(honest).nominee_place
    for row in (0, 17, 58):
        said = honest.kinds[0][int(nominee[row])]
        carries = replace(honest.take(torch.tensor([row])), captions=(said,), reference=honest)
        asked = len(electorate(honest).asked)
        assert untrained_vote(carries).own.item() * asked == pytest.approx(place[row].item())


def test_who_is_not_asked_about_a_crowd_is_not_the_worst_witness_of_its_claim(
    honest: PairFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    features = crowd(honest, rows, ["violin concert"] * 7)
    assert claims(features).crowded[rows].all()
    counts = np.bincount(features.kinds[1])
    assert counts.max() == 7 > np.quantile(counts, 0.99)
    assert not disputed(features).any(), "a crowd has one voice"
    monkeypatch.setattr(module, "disputed", lambda pairs: np.ones(len(pairs), bool))
    said = witnesses(features)
    assert said[-1][rows].isnan().all() and not said[:-1].isnan().any()
    shares = said[:-1][:, rows]
    sound = shares[said[:-1].median(dim=1).values <= SOUND]
    worst = torch.maximum(combined_p(*shares), sound.amax(dim=0)).numpy()
    np.testing.assert_allclose(p_values(features)[rows], best_of(worst, np.full(7, 7)), rtol=1e-6)


def test_four_times_the_same_claim_is_the_best_of_two_draws() -> None:
    found = best_of(np.array([0.1, 0.1, 0.1, 1.0]), np.array([1, 4, 9, 4]))
    np.testing.assert_allclose(found, [0.1, 0.19, 0.271, 1.0], atol=1e-6)


def test_the_prior_is_the_worst_record_of_caption_and_crowd(honest: PairFeatures) -> None:
    rows = [0, 13, 26, 39, 52, 65, 78]
    features = crowd(honest, rows, [f"violin concert{i}" for i in range(7)])
    record = _record(features)
    prior, share = record.prior(Ties.of(features)), record.mixture.share
    mates = record.lie[rows[1:]].sum()
    np.testing.assert_allclose(prior[0], max(share, (share + mates) / 7))
