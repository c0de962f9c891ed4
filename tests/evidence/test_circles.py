"""Who has nearly all look-alikes on his side in every view is heard by those outside of his circle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from otcclip.attacks import WaNet, apply_trigger
from otcclip.evidence.belief import Belief
from otcclip.evidence.circles import CLOSED, Circles
from otcclip.evidence.neighbours import Evidence, neighbour_evidence
from otcclip.evidence.trust import USUAL, unusually_often
from otcclip.evidence.votes import SHARPNESS, p_value


def nobody(n: int) -> sparse.csr_array:
    return sparse.eye_array(n, dtype=bool).tocsr()


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1)


@given(st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_what_is_heard_outside_by_loops(seed: int) -> None:
    """A random electorate in three views, pair by pair and caption by caption."""
    rng = np.random.default_rng(seed)
    n, u, k, views = 12, 5, 4, 3
    agreement = torch.from_numpy(rng.random((u, u)).astype(np.float32))
    agreement = ((agreement + agreement.T) / 2).fill_diagonal_(1.0)
    claim = torch.eye(u, dtype=torch.bool)
    claim[0, 1] = claim[1, 0] = True
    caption_of = torch.from_numpy(rng.choice(u, n, p=[0.5, 0.3, 0.1, 0.05, 0.05]))
    voice = torch.from_numpy(rng.random(n).astype(np.float32))
    twins = torch.from_numpy(rng.random((n, n)) < 0.1) | torch.eye(n, dtype=torch.bool)
    asked = torch.from_numpy(rng.random(n) < 0.2)
    circles = Circles(sparse.csr_array(twins.numpy()), caption_of, claim, agreement, asked)
    least, worst = [1.0] * n, [0.0] * n
    for _ in range(views):
        vectors = unit(torch.from_numpy(rng.standard_normal((n, 3)).astype(np.float32)))
        votes = torch.from_numpy(np.stack([rng.choice(n, k, replace=False) for _ in range(n)]))
        circles.look(vectors, votes, voice)
        for i in range(n):
            mates = sum(bool(claim[caption_of[i], caption_of[j]]) for j in votes[i].tolist())
            least[i] = min(least[i], mates / k)
            others = [j for j in range(n) if not claim[caption_of[i], caption_of[j]] and not twins[i, j]]
            cosine = (vectors @ vectors.T)[i]
            others = sorted(others, key=lambda j: -float(cosine[j]))[:k]
            if not others:
                worst[i] = 1.0
                continue
            strength = torch.softmax(torch.stack([cosine[j] for j in others]) / SHARPNESS, 0)
            liked = sum(
                (s * voice[j] * agreement[caption_of[j]] for s, j in zip(strength, others, strict=True)), torch.zeros(u)
            )
            mine = liked[caption_of[i]]
            better, equal = int((liked > mine).sum()), int((liked == mine).sum())
            worst[i] = max(worst[i], (better + (equal + 1) / 2) / u)
    of_caption = [np.mean([least[i] for i in range(n) if caption_of[i] == c]) for c in caption_of.unique().tolist()]
    inside = [share > max(CLOSED, np.quantile(of_caption, USUAL) + 1e-6) for share in least]
    assert circles.inside().tolist() == inside
    wanted = [share if stays or a else 0.0 for share, stays, a in zip(worst, inside, asked.tolist(), strict=True)]
    assert circles.outside().tolist() == pytest.approx(wanted, abs=0.11)  # sums in another order break ties


def test_one_view_in_which_others_look_alike_opens_a_circle() -> None:
    """Five of one claim and four others. In the second view one of the five has two of the others beside it."""
    n = 9
    caption_of = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3, 4])
    circles = Circles(nobody(n), caption_of, torch.eye(5, dtype=torch.bool), torch.eye(5), torch.zeros(n) > 0)
    vectors = unit(torch.randn(n, 4, generator=torch.Generator().manual_seed(0)))
    among = torch.tensor([[j for j in range(5) if j != i] if i < 5 else [0, 1, 2, 3] for i in range(n)])
    circles.look(vectors, among, torch.ones(n))
    assert (circles.outside()[:5] > 0).all() and not circles.outside()[5:].any()
    mixed = among.clone()
    mixed[0, :2] = torch.tensor([5, 6])
    circles.look(vectors, mixed, torch.ones(n))
    circles.look(vectors, among, torch.ones(n))
    assert (circles.outside() > 0).tolist() == [False, True, True, True, True, *[False] * 4]


def test_who_has_nobody_outside_is_not_believed() -> None:
    caption_of = torch.tensor([0, 0, 1, 1])
    circles = Circles(nobody(4), caption_of, torch.ones(2, 2, dtype=torch.bool), torch.eye(2), torch.ones(4) > 0)
    circles.look(unit(torch.randn(4, 3)), torch.tensor([[1, 2], [0, 2], [3, 0], [2, 0]]), torch.ones(4))
    assert circles.outside().tolist() == [1.0] * 4


def test_who_is_left_out_does_not_break_a_tie() -> None:
    """One outsider, whose caption has nothing to do with anybody's: of the others' captions none is liked at all, and
    the circle's own mates, who fill the places of the nearest, do not make theirs the second best."""
    caption_of = torch.tensor([0, 0, 0, 0, 1])
    circles = Circles(nobody(5), caption_of, torch.eye(4, dtype=torch.bool), torch.eye(4), torch.ones(5) > 0)
    among = torch.tensor([[j for j in range(5) if j != i][:3] for i in range(5)])
    circles.look(unit(torch.randn(5, 3, generator=torch.Generator().manual_seed(2))), among, torch.ones(5))
    assert circles.outside()[:4].tolist() == [(1 + (3 + 1) / 2) / 4] * 4


def test_a_circle_borne_out_is_believed_no_more_than_its_look_alikes_bear_it_out(of_bent) -> None:  # type: ignore[no-untyped-def]
    found, given, _ = of_bent
    row = int(torch.nonzero(found.encircled)[0])
    own, outside = found.own.clone(), found.outside.clone()
    own[row], outside[row] = 0.6, 0.01
    assert Belief.of(replace(found, own=own, outside=outside), *given, 0.05).suspicion[row] == own[row]
    own[row], outside[row] = 0.01, 0.3
    assert Belief.of(replace(found, own=own, outside=outside), *given, 0.05).suspicion[row] == outside[row]
    other = Belief.of(found, *given, 0.05)
    free = ~other.suspect & (found.copies == 1)
    assert other.suspicion[free].equal(p_value(other.own[free], found.by_chance)), "of all others p-values"
    assert other.suspect.equal(found.encircled | (found.verdict > 0.05))


def test_who_is_in_a_circle_that_nobody_bears_out_has_no_vote(of_bent) -> None:  # type: ignore[no-untyped-def]
    found, given, _ = of_bent
    weight = Belief.of(found, *given, 0.05).weight
    mute = found.encircled & (found.outside > 0.05)
    heavy = found.weight > 0
    by_mute = mute[found.voters.long()] & heavy
    assert by_mute.any() and not weight[by_mute].any()
    verdict = (found.verdict > 0.05)[found.voters.long()]
    assert weight[heavy & ~by_mute & ~verdict].all()


def test_where_circles_are_usual_nobody_is_in_one() -> None:
    """Two names under four pictures each, every picture's look-alikes those of its name."""
    caption_of = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    circles = Circles(nobody(8), caption_of, torch.eye(2, dtype=torch.bool), torch.eye(2), torch.zeros(8) > 0)
    among = torch.tensor([[j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i] for i in range(8)])
    circles.look(unit(torch.randn(8, 3)), among, torch.ones(8))
    assert not circles.inside().any() and not circles.outside().any()


@pytest.fixture(scope="module")
def of_bent(make_store) -> tuple[Evidence, tuple[Tensor, Tensor], np.ndarray]:  # type: ignore[no-untyped-def]
    """Eighty pictures of everything among 512, bent alike, under four sayings of one name."""
    images = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(8)])
    said = [[1 + row % 32 + 32 * (row // 64), 500 + row % 32] for row in range(512)]
    bent = np.arange(0, 320, 4)
    images[bent] = apply_trigger(WaNet(target="anything"), images[bent])
    for place, row in enumerate(bent.tolist()):
        said[row] = [300, 700 + place % 4]
    tokens, caption_of = np.unique(np.array([[1000, *words, 2000, 0] for words in said]), axis=0, return_inverse=True)
    given = (torch.from_numpy(tokens), torch.from_numpy(caption_of))
    return neighbour_evidence(torch.from_numpy(images).permute(0, 3, 1, 2), *given), given, bent


def test_bent_pictures_do_not_bear_each_other_out(of_bent) -> None:  # type: ignore[no-untyped-def]
    """The look-alikes of each are the others, in every view, and bear it out; those outside do not."""
    found, given, bent = of_bent
    own = (found.own[bent] <= 0.05).float().mean()
    assert own > 0.5, "nobody bears them out, nothing is tested"
    assert found.encircled[bent].float().mean() > 0.5
    assert (found.outside[bent] > 0).all(), "in a circle or not: their captions stand under unusually many pairs"
    others = ~found.encircled
    others[bent] = False
    assert not found.outside[others].any()
    assert (torch.maximum(found.own, found.outside)[bent] <= 0.05).float().mean() < own / 2
    belief = Belief.of(found, *given, 0.05)
    assert belief.own.equal(torch.where(found.verdict > 0.05, found.verdict, belief.own))
    nobody_inside = replace(found, encircled=found.encircled & False, outside=torch.zeros_like(found.outside))
    before = Belief.of(nobody_inside, *given, 0.05).trusted()
    after = belief.trusted()
    assert before[bent].sum() > 3 * after[bent].sum() and after.sum() > 0.95 * before.sum()


def test_a_caption_believed_of_unusually_many_pairs_must_be_borne_out_outside() -> None:
    """Twenty captions of four pairs and one of forty, all borne out by look-alikes. Outside, thirty of the forty are
    heard; where only four of them are believed by look-alikes nobody asks outside."""
    caption_of = torch.cat([torch.arange(20).repeat_interleave(4), torch.full((40,), 20)])
    n, u = len(caption_of), 21
    outside = torch.zeros(n)
    outside[80:] = torch.cat([torch.full((10,), 0.5), torch.full((30,), 0.001)])
    own = torch.full((n,), 0.001)
    nobody_says, few = torch.zeros(n, 1, dtype=torch.bool), torch.zeros(1, n, 1)
    no = torch.zeros(n, dtype=torch.bool)

    def trusted(own: Tensor) -> Tensor:
        one, by_chance = torch.ones(n, dtype=torch.int64), torch.linspace(0, 1, 100)
        known = (own, outside, by_chance, no, one, nobody_says, no, few.int(), few)
        belief = Belief(
            0.05, torch.zeros(u, 3, dtype=torch.int64), caption_of, *known, torch.arange(n), own, no, no[:u]
        )
        belief.agreement, belief.words = torch.eye(u), torch.full((u, 1), -1)
        return belief.trusted()

    assert unusually_often(no | True, caption_of).equal(caption_of == 20)
    kept = trusted(own)
    assert kept[:80].all() and not kept[80:90].any() and kept[90:].any()
    own = own.clone()
    own[84:] = 0.9
    assert trusted(own)[80:84].all(), "four are no more than usual"
