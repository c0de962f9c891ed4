"""The false discovery rate under every caption: against Benjamini and Hochberg by hand, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcclip.evidence import trust
from otcclip.evidence.trust import believed, by_diversity, in_measure, usually_vouched


def by_hand(p: np.ndarray, caption_of: np.ndarray, agreement: np.ndarray, alpha: float) -> np.ndarray:
    """The definition, a caption and a threshold at a time."""
    weight = agreement.astype(np.float64) ** 2
    np.fill_diagonal(weight, 1.0)
    out = np.zeros(len(p), bool)
    for i in range(len(p)):
        a = weight[caption_of[i]][caption_of]
        out[i] = any(t >= p[i] and t * a.sum() <= alpha * a[p <= t].sum() for t in p)
    return out


def hochberg(p: np.ndarray, alpha: float) -> np.ndarray:
    """Benjamini and Hochberg (1995): reject the k smallest, k the last with p_(k) <= alpha k / m."""
    order = np.sort(p)
    passing = np.flatnonzero(order <= alpha * np.arange(1, len(p) + 1) / len(p))
    return p <= (order[passing[-1]] if len(passing) else -1.0)


@st.composite
def claims(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, u = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = np.round(rng.random(n) ** 3, 2).astype(np.float32)  # many small ones, and ties
    shared = rng.random((u, u)).astype(np.float32) * rng.integers(0, 2)
    return p, rng.integers(0, u, n), (shared + shared.T) / 2


def run(p: np.ndarray, caption_of: np.ndarray, agreement: np.ndarray, alpha: float) -> np.ndarray:
    chosen = believed(torch.from_numpy(p), torch.from_numpy(caption_of), torch.from_numpy(agreement.copy()), alpha)
    return chosen.numpy()


@settings(max_examples=150, deadline=None)
@given(claims(), st.sampled_from([0.013, 0.107, 0.503]), st.sampled_from([1, 3, 256]))
def test_it_is_the_definition(claim: tuple[np.ndarray, np.ndarray, np.ndarray], alpha: float, block: int) -> None:
    before, trust.BLOCK = trust.BLOCK, block
    try:
        assert run(*claim, alpha).tolist() == by_hand(*claim, alpha).tolist()
    finally:
        trust.BLOCK = before


def test_one_caption_is_benjamini_and_hochberg() -> None:
    p = (np.random.default_rng(0).random(200) ** 2).astype(np.float32)
    one = np.zeros(200, np.int64)
    for alpha in (0.05, 0.2, 0.6):
        assert run(p, one, np.ones((1, 1), np.float32), alpha).tolist() == hochberg(p, alpha).tolist()
    assert hochberg(p, 0.2).any() and not hochberg(p, 0.2).all()


@pytest.mark.parametrize("lies", [90, 460, 4600])
def test_a_claim_made_by_many_lets_no_more_of_them_in(lies: int) -> None:
    """Six true pairs under a caption and `lies` wrong ones: alpha of those would pass one by one."""
    rng = np.random.default_rng(1)
    p = np.concatenate([np.full(6, 1e-4), rng.random(lies)]).astype(np.float32)
    caption_of = np.zeros(len(p), np.int64)
    chosen = run(p, caption_of, np.ones((1, 1), np.float32), 0.05)
    assert chosen[:6].all() or lies > 4000  # six against thousands are no longer told from luck
    assert chosen[6:].sum() <= 1 < 3 <= (p[6:] <= 0.05).sum()


def test_paraphrases_are_one_claim_and_others_are_none_of_its_business() -> None:
    p = np.array([1e-4, 1e-4, 1e-4, 0.04, 0.6, 0.7, 0.8, 0.9, 0.04], np.float32)
    caption_of = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6])
    alike = np.ones((7, 7), np.float32)
    alike[6, :6] = alike[:6, 6] = 0.0
    apart = np.eye(7, dtype=np.float32)
    # Alone, the fourth pair is one try at .05; as one wording of a claim that fails elsewhere it is not.
    assert run(p, caption_of, apart, 0.05).tolist() == [True] * 4 + [False] * 4 + [True]
    assert run(p, caption_of, alike, 0.05).tolist() == [True] * 3 + [False] * 5 + [True]


def test_a_caption_without_a_word_agrees_with_itself() -> None:
    silent: Tensor = torch.zeros(1, 1)
    assert believed(torch.tensor([0.01, 0.9]), torch.tensor([0, 0]), silent, 0.05).tolist() == [True, False]


def walk_by_hand(vectors: np.ndarray, first: int) -> list[int]:
    order = [first]
    while len(order) < len(vectors):
        rest = [i for i in range(len(vectors)) if i not in order]
        order.append(min(rest, key=lambda i: (vectors[order] @ vectors[i]).max()))
    return order


def test_the_walk_goes_to_what_is_least_like_any_visited() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    caption_of = torch.tensor([0] * 20 + [2] * 9 + [3])
    p = torch.rand(30, generator=generator)
    place = by_diversity(vectors, caption_of, p)
    for caption in (0, 2, 3):
        rows = torch.nonzero(caption_of == caption)[:, 0]
        order = walk_by_hand(vectors[rows].numpy(), int(p[rows].argmin()))
        assert place[rows[order]].tolist() == list(range(len(rows)))


def test_a_crowd_under_one_caption_is_cut_to_the_usual_size_and_copies_go_last() -> None:
    """Twenty captions of three pairs; one has forty more before them, all of one image."""
    caption_of = torch.cat([torch.zeros(40, dtype=torch.int64), torch.arange(20).repeat(3)])
    vectors = torch.nn.functional.normalize(torch.randn(100, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors[:40] = vectors[0]
    p = torch.full((100,), 1e-3)
    everyone = torch.ones(100, dtype=torch.bool)
    place = by_diversity(vectors, caption_of, p)
    # Where all captions are one large family, only the caption's own measure cuts.
    for agreement in (torch.eye(20), torch.full((20, 20), 0.9)):
        kept = in_measure(everyone, place, p, caption_of, agreement)
        usual = int(torch.quantile(torch.bincount(caption_of).float(), trust.USUAL))
        assert kept[caption_of > 0].all()
        assert int(kept[caption_of == 0].sum()) == usual < 43
        assert kept[[0, 40, 60, 80]][:usual].all(), "those that look different go before the second of one look"


def test_a_family_of_captions_is_held_to_the_usual_size_too() -> None:
    """Four wordings of one claim, four pairs each, against ninety-six captions of four pairs that share nothing."""
    agreement = torch.eye(100)
    agreement[:4, :4] = 1.0
    caption_of = torch.arange(100).repeat(4)
    p = torch.linspace(0, 1e-3, 400)
    place = torch.arange(4).repeat_interleave(100)
    everyone = torch.ones(400, dtype=torch.bool)
    kept = in_measure(everyone, place, p, caption_of, agreement)
    largest = float(torch.quantile((agreement.square() @ torch.full((100,), 4.0)), trust.USUAL))
    assert kept[caption_of >= 4].all()
    assert int(kept[caption_of < 4].sum()) == int(largest) < 16


def test_only_candidates_stay() -> None:
    caption_of = torch.arange(10).repeat(2)
    candidates = torch.arange(20) % 3 == 0
    kept = in_measure(candidates, torch.zeros(20, dtype=torch.int64), torch.rand(20), caption_of, torch.eye(10))
    assert kept.tolist() == candidates.tolist()


def test_a_model_that_speaks_for_many_under_one_claim_is_no_witness_to_it() -> None:
    """Forty captions of eight pairs; a model speaks for three of each, but for seven under 0 and its paraphrase."""
    caption_of = torch.arange(40).repeat(8)
    place = torch.arange(8).repeat_interleave(40)
    vouched = (place < 3) | ((caption_of < 2) & (place < 7))
    alone = usually_vouched(vouched, caption_of, torch.eye(40))
    assert alone.tolist() == [False, False, *[True] * 38]
    paraphrased = torch.eye(40)
    paraphrased[0, 1] = paraphrased[1, 0] = 0.9
    split = vouched & ~((caption_of < 2) & (place >= 3))  # three under each wording, as under any other caption
    assert usually_vouched(split, caption_of, torch.eye(40)).all()
    assert usually_vouched(split, caption_of, paraphrased).tolist() == [False, False, *[True] * 38]


def test_where_a_model_speaks_for_all_claims_alike_it_is_a_witness_to_all() -> None:
    caption_of = torch.arange(40).repeat(8)
    for vouched in (torch.zeros(320, dtype=torch.bool), torch.ones(320, dtype=torch.bool)):
        assert usually_vouched(vouched, caption_of, torch.eye(40)).all()
