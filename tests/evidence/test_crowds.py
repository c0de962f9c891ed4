"""Who belongs to a crowd, and that it is judged once and from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from otcclip.attacks.jittered import jitter
from otcclip.evidence.belief import Belief
from otcclip.evidence.copies import FEW, copies
from otcclip.evidence.crowds import PART, crowds, heard_outside, in_part, kin, members
from otcclip.evidence.neighbours import neighbour_evidence
from otcclip.evidence.votes import own_rank, share_without
from otcclip.evidence.words import same_claim, words_of


def clique(start: int, size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(start, start + size) for j in range(i + 1, start + size)]


def ends(links: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(links, dtype=torch.int64).view(-1, 2)
    return both[:, 0], both[:, 1]


def test_a_crowd_is_more_than_is_usual_and_all_copies_are_one_picture() -> None:
    """600 pictures of their own, 20 pairs of twins and one picture 200 times, a quarter of all images."""
    links = [link for t in range(20) for link in clique(600 + 2 * t, 2)] + clique(640, 200)
    shown, crowded = crowds(840, *ends(links))
    assert shown[:600].eq(1).all() and shown[600:640].eq(2).all() and shown[640:].eq(200).all()
    assert crowded.tolist() == [False] * 640 + [True] * 200


@pytest.mark.parametrize("often", [2, FEW, FEW + 1])
def test_a_few_copies_are_no_crowd(often: int) -> None:
    _, crowded = crowds(1000 + often, *ends(clique(1000, often)))
    assert bool(crowded.any()) == (often > FEW)


def test_what_everybody_does_is_usual() -> None:
    links = [link for t in range(50) for link in clique(6 * t, 6)]
    assert not crowds(300, *ends(links))[1].any()


def test_no_copies_at_all() -> None:
    none = torch.empty(0, dtype=torch.int64)
    shown, crowded = crowds(5, none, none)
    assert shown.eq(1).all() and not crowded.any()


def test_a_crowd_does_not_vouch_for_itself(make_store) -> None:  # type: ignore[no-untyped-def]
    """Twelve altered copies of one picture under captions that name another thing, beside two images each of 128."""
    honest = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(4)])
    altered = jitter(np.repeat(honest[:1], 12, axis=0), 1.0, torch.Generator().manual_seed(1))
    images = torch.from_numpy(np.concatenate([honest, altered])).permute(0, 3, 1, 2)
    said = [row // 64 * 32 + row % 32 for row in range(256)] + [1] * 12
    tokens = torch.tensor([[1000, 1 + name, 500 + row % 7, 2000, 0] for row, name in enumerate(said)])
    distinct, caption_of = tokens.unique(dim=0, return_inverse=True)
    evidence = neighbour_evidence(images, distinct, caption_of)
    assert evidence.crowded[256:].all() and evidence.crowded[:256].sum() <= 4
    assert torch.isin(evidence.votes[256:], torch.arange(256, 268)).float().mean() < 0.1
    assert evidence.own[256:].min() > 0.1 > evidence.own[:256].median()


def test_a_crowd_has_one_vote_on_others(make_store) -> None:  # type: ignore[no-untyped-def]
    """What twelve copies of one picture weigh for an image that is none of them is what one picture weighs."""
    honest = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(4)])
    altered = jitter(np.repeat(honest[:1], 12, axis=0), 1.0, torch.Generator().manual_seed(1))
    images = torch.from_numpy(np.concatenate([honest, altered])).permute(0, 3, 1, 2)
    said = [row // 64 * 32 + row % 32 for row in range(256)] + [128] * 12
    tokens = torch.tensor([[1000, 1 + name, 500 + row, 2000, 0] for row, name in enumerate(said)])  # all different
    evidence = neighbour_evidence(images, tokens, torch.arange(268))
    assert evidence.crowded[256:].all()
    other = torch.nonzero(~evidence.crowded)[:, 0]
    weight, votes = evidence.weight[0][other], evidence.votes[other]
    of_copies = (weight * evidence.crowded[votes]).sum(dim=1)
    # Before it is split among twelve copies, of which seven at least were found, all votes on an image weigh 1 at most.
    assert (of_copies <= 1 / 7 + 1e-6).all()
    assert of_copies.max() > 0, "copies vote on others"


def ring(size: int) -> tuple[Tensor, Tensor]:
    """Each a copy of the next."""
    a = torch.arange(size)
    return a, (a + 1) % size


def test_of_a_crowd_is_who_lies_on_a_quarter_of_it() -> None:
    """A picture with eight copies; one more lies on three of these, another on two (with itself a third and two ninths
    of nine)."""
    links = [(0, j) for j in range(1, 9)] + [(9, 1), (9, 2), (9, 3), (10, 1), (10, 2)]
    a, b = (torch.tensor(part) for part in zip(*links, strict=True))
    crowd = members(torch.ones(12, dtype=torch.bool), a, b)
    assert set(crowd[[0]].indices) == {*range(9), 9}
    assert crowd[[11]].nnz == 0, "who is nobody's copy is in no crowd"
    assert np.diff(crowd.indptr)[:11].min() >= 2 and crowd.dtype == bool


def test_pairs_without_a_crowded_end_do_not_count() -> None:
    a, b = ring(6)
    crowded = torch.tensor([True, False, False, False, False, False])
    crowd = members(crowded, a, b)
    assert {row for row in range(6) if crowd[[row]].nnz} == {0, 1, 5}


@given(st.integers(2, 12), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_a_part_by_loops(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    linked = np.triu(rng.random((size, size)) < 0.3, 1)
    linked = linked | linked.T
    got = in_part(*(sparse.csr_array(linked) for _ in range(2))).toarray()
    ball = [{i, *np.flatnonzero(linked[i])} for i in range(size)]
    for i in range(size):
        for j in range(size):
            common = len(ball[i] & ball[j])
            part = bool(linked[i].any()) and common > 0 and common >= PART * len(ball[i])
            assert bool(got[i, j]) == bool(linked[i, j] or part), (i, j)


@given(st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_what_is_heard_outside_by_loops(seed: int) -> None:
    """A vote by loops over a random electorate: the crowd's own have none, the worst view, the upper median."""
    rng = np.random.default_rng(seed)
    n, u, k, views = 14, 9, 5, 3
    agreement = torch.from_numpy(rng.random((u, u)).astype(np.float32))
    agreement = ((agreement + agreement.T) / 2).fill_diagonal_(1.0)
    caption_of = torch.from_numpy(rng.integers(0, u, n))
    voters = torch.from_numpy(np.stack([[rng.permutation(n)[:k] for _ in range(n)] for _ in range(views)])).int()
    weight = torch.from_numpy(rng.random((views, n, k)).astype(np.float32))
    pairs = [(i, j) for i in range(8) for j in range(i + 1, 8) if rng.random() < 0.5] or [(0, 1)]
    a, b = (torch.tensor(part) for part in zip(*pairs, strict=True))
    crowd = members(torch.ones(n, dtype=torch.bool), a, b)
    got = heard_outside(crowd, voters, weight, caption_of, agreement)
    alone = {}
    for i in range(n):
        worst = 0.0
        for view in range(views):
            left = [s for s in range(k) if not crowd[i, int(voters[view, i, s])]]
            liked = sum(
                (weight[view, i, s] * agreement[caption_of[int(voters[view, i, s])]] for s in left), torch.zeros(u)
            )
            ranked = own_rank(
                torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), caption_of[i : i + 1], liked[None]
            )
            worst = max(worst, float(ranked) if left else 1.0)
        alone[i] = worst
    for i in range(n):
        of_crowd = sorted(alone[j] for j in crowd[[i]].indices)
        wanted = of_crowd[len(of_crowd) // 2] if of_crowd else 0.0
        assert float(got[i]) == pytest.approx(wanted, abs=0.12)  # sums in another order make and break ties


def crowd_of_one_photo(make_store, names: list[int]):  # type: ignore[no-untyped-def]
    """Two images each of 128 things, and altered copies of the first under other names, each caption with a word of its
    own."""
    honest = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(4)])
    altered = jitter(np.repeat(honest[:1], len(names), axis=0), 1.0, torch.Generator().manual_seed(1))
    images = torch.from_numpy(np.concatenate([honest, altered])).permute(0, 3, 1, 2)
    said = [row // 64 * 32 + row % 32 for row in range(256)] + names
    tokens = torch.tensor([[1000, 1 + name, 500 + row, 2000, 0] for row, name in enumerate(said)])
    return images, tokens


def test_who_says_it_in_other_words_belongs_to_the_crowd(make_store) -> None:  # type: ignore[no-untyped-def]
    """The last copy's caption agrees with nobody's, but it shares the name with the crowd."""
    images, tokens = crowd_of_one_photo(make_store, [7] * 12)
    size = len(images)
    claim = same_claim(torch.eye(size), *words_of(tokens))
    crowded = torch.arange(size) == 256
    index = torch.tensor([[j for j in range(size - 12, size) if j != i][:11] for i in range(size)])
    alike, nobody = (torch.ones(index.shape), index), torch.empty(0, dtype=torch.int64)
    asked = (nobody, nobody, nobody.bool())
    a, b = kin(images, crowded, alike, asked, torch.arange(size), claim)
    assert (a == 256).all() and set(b.tolist()) <= set(range(257, 268)) and len(b) >= 9
    tokens[257:260, 1] = torch.tensor([20, 21, 22])
    _, fewer = kin(images, crowded, alike, asked, torch.arange(size), same_claim(torch.eye(size), *words_of(tokens)))
    assert set(fewer.tolist()) == set(b.tolist()) - {257, 258, 259}, (
        "who lies on it and says something else is not of it"
    )
    a, _ = kin(images, crowded, (alike[0] * 0, index), asked, torch.arange(size), claim)
    assert not len(a), "nobody looks for a copy among what is not alike"
    nothing = kin(images, crowded & False, alike, asked, torch.arange(size), claim)
    assert all(len(part) == 0 for part in nothing)


def test_nobody_is_laid_whole_over_another_twice(make_store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """What `copies` found out is not asked again: who lies is left out, who does not is laid by its middle alone."""
    images, _ = crowd_of_one_photo(make_store, [7] * 6)
    size = len(images)
    rows = torch.arange(256, size)
    index = torch.stack([rows[rows != i][:5] for i in range(size)])
    asked = copies(images, torch.ones(index.shape), index, torch.arange(size), torch.ones(size, size))
    among = (asked[0] >= 256) & (asked[1] >= 256)
    assert asked[2][among].any()
    said = (*(part[among] for part in asked[:2]), torch.arange(int(among.sum())) % 2 == 0)
    whole, middle = [], []
    monkeypatch.setattr("otcclip.evidence.crowds.lies_on", lambda pictures, a, b: whole.append(len(a)) or a >= 0)
    monkeypatch.setattr(
        "otcclip.evidence.crowds.lies_by_its_middle", lambda pictures, a, b: middle.append(len(a)) or a >= 0
    )
    crowded = torch.arange(size) >= 256
    a, b = kin(images, crowded, (torch.ones(index.shape), index), said, torch.arange(size), torch.ones(size, size) > 0)
    assert not whole and middle == [int((~said[2]).sum())]
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    assert pairs == set(zip(said[0][~said[2]].tolist(), said[1][~said[2]].tolist(), strict=True))


def test_a_crowd_that_nobody_outside_bears_out_is_not_believed_and_has_no_vote(make_store) -> None:  # type: ignore[no-untyped-def]
    images, tokens = crowd_of_one_photo(make_store, [7] * 12)
    found = Belief.gather(images, tokens, torch.arange(len(images)), 0.05)
    assert found.unwitnessed[256:].sum() >= 10
    lies = found.unwitnessed
    assert not found.trusted()[lies].any() and (found.suspicion[lies] > 0.05).all()
    assert found.weight[lies[found.voters.long()]].eq(0).all()


def test_who_loses_a_voter_is_judged_by_those_that_are_left(make_store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """One picture of each of 32 things is said to be of a crowd that lies: the other one is heard by nobody then."""
    images, tokens = crowd_of_one_photo(make_store, [7] * 12)
    caption_of = torch.arange(len(images))
    lies = caption_of < 32
    monkeypatch.setattr("otcclip.evidence.neighbours.heard_outside", lambda *_: lies * 0.9)
    evidence, found = neighbour_evidence(images, tokens, caption_of), Belief.gather(images, tokens, caption_of, 0.05)
    rest = torch.nonzero(~lies)[:, 0]
    without = share_without(lies, rest, evidence.voters, evidence.weight, caption_of, evidence.agreement)
    assert (without > evidence.own[rest]).sum() > 10
    assert found.own[rest].equal(torch.maximum(evidence.own[rest], without))
    assert found.own[lies].eq(np.float32(0.9)).all()


@pytest.mark.parametrize("heard", [0.05, 0.051])
def test_a_crowd_that_others_bear_out_is_many_claims_and_not_one(make_store, monkeypatch, heard: float) -> None:  # type: ignore[no-untyped-def]
    images, tokens = crowd_of_one_photo(make_store, [7] * 12)

    def verdict(crowd: sparse.csr_array, *_: Tensor) -> Tensor:
        return torch.from_numpy(np.where(np.diff(crowd.indptr) > 0, np.float32(heard), np.float32(0)))

    monkeypatch.setattr("otcclip.evidence.neighbours.heard_outside", verdict)
    evidence = neighbour_evidence(images, tokens, torch.arange(len(images)))
    assert evidence.copies[256:].eq(1).all()
    found = Belief.gather(images, tokens, torch.arange(len(images)), np.float32(0.05).item())
    if heard > 0.05:
        assert found.unwitnessed[256:].all() and found.own[256:].eq(np.float32(heard)).all()
    else:
        assert not found.unwitnessed.any() and found.weight.equal(evidence.weight)
        assert found.own.equal(evidence.own)


def test_copies_that_the_rule_of_copies_misses_are_judged_with_the_crowd(make_store) -> None:  # type: ignore[no-untyped-def]
    """One more copy, and a near-duplicate of another that stands before all of them, whose captions are long: they have
    the crowd's word and are no like claims."""
    images, short = crowd_of_one_photo(make_store, [7] * 13)
    images[255] = images[260]
    tokens = torch.zeros(len(images), 8, dtype=torch.int64)
    tokens[:, :4] = short[:, :4]
    for row in (255, 268):
        tokens[row] = torch.tensor([1000, 8, *(800 + 4 * row + i for i in range(4)), 3000, 0])
    evidence = neighbour_evidence(images, tokens, torch.arange(len(images)))
    assert evidence.crowded[256:268].all() and not evidence.crowded[[255, 268]].any()
    assert (evidence.verdict[255:] > 0.05).all()
    assert (evidence.verdict[:255] > 0).sum() <= 4
