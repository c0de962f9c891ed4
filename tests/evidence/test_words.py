"""A word that nobody who sees the like uses is found, and used by as many pairs as is usual and no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from otcclip.evidence import words as module
from otcclip.evidence.words import NONE, doubtful, rarely_unheard, same_claim, unheard, words_of

START, END = 1000, 2000


def tokens_of(captions: list[list[int]]) -> Tensor:
    width = max(map(len, captions)) + 3
    return torch.tensor([[START, *c, END, *[0] * (width - len(c) - 2)] for c in captions])


def said(words: Tensor) -> list[int]:
    return [int((row != NONE).sum()) for row in words]


def test_words_are_distinct_and_those_of_every_caption_are_left_out() -> None:
    """Token 7 stands in all captions and says nothing; a word said twice is one."""
    words, much = words_of(tokens_of([[7, 1, 2], [7, 2, 3, 3], [7, 1]]))
    assert much.equal(words != NONE)
    assert said(words) == [2, 2, 1]
    assert words[0, 0] == words[2, 0] and words[0, 1] == words[1, 0] and words[1, 1] not in words[0]


def test_no_words_at_all() -> None:
    words, much = words_of(tokens_of([[7], [7]]))
    assert words.shape == (2, 1) and (words == NONE).all()
    assert not unheard(words, much, torch.tensor([0, 1]), torch.tensor([[1], [0]])).any()


def test_a_word_among_many_says_little() -> None:
    """Of forty words of a caption none has a tenth of its mass; each is heard of all the same."""
    words, much = words_of(tokens_of([list(range(1, 41)), [1], [2, 50]]))
    assert not much[0].any() and much[1, 0] and much[2, :2].all()
    votes = torch.tensor([[2], [0], [0]])
    lacking = unheard(words, much, torch.arange(3), votes)
    assert not lacking[0].any() and not lacking[1].any() and lacking[2].sum() == 1


def test_one_claim_by_the_like_or_by_a_word_that_says_much() -> None:
    """Token 1 is in every caption and says nothing; 7 and 8 are in two each."""
    words, much = words_of(tokens_of([[1, 7, 20], [1, 7, 21], [1, 8, 22], [1, 8, 23]]))
    nothing, pairs = torch.zeros(4, 4), torch.tensor([[0, 1], [2, 3]])
    wanted = torch.eye(4, dtype=torch.bool)
    wanted[pairs[:, 0], pairs[:, 1]] = wanted[pairs[:, 1], pairs[:, 0]] = True
    assert same_claim(nothing, words, much).equal(wanted)
    for silent in ([0, 1, 2, 3], [0, 2], [1, 3]):  # it must say much to both
        less = much.clone()
        less[silent] = False
        assert same_claim(nothing, words, less).equal(torch.eye(4, dtype=torch.bool))
    assert same_claim(nothing + 0.25, words, much & False).all()
    silent_words = torch.full_like(words, NONE)
    assert same_claim(nothing, silent_words, much & False).equal(torch.eye(4, dtype=torch.bool))


@given(st.data())
def test_unheard_is_what_sets_say(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 8))
    captions = [data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True)) for _ in range(n)]
    words, _ = words_of(tokens_of([*captions, [900], [901]]))  # two more, so that no word stands in all
    votes = torch.tensor([data.draw(st.lists(st.integers(0, n - 1), min_size=3, max_size=3)) for _ in range(n)])
    got = unheard(words, words != NONE, torch.arange(n), votes)
    for i in range(n):
        heard = {word for j in votes[i].tolist() for word in words[j].tolist()}
        assert got[i].tolist() == [word != NONE and word not in heard for word in words[i].tolist()]


@pytest.fixture
def claims() -> tuple[Tensor, Tensor, Tensor]:
    """Captions [200], their words, what is unheard: 40 pairs use the last word (200) unheard, 20 one of their own."""
    words = torch.arange(200)[:, None]
    words = torch.cat([words, torch.full((200, 1), NONE)], dim=1)
    words[:40, 1] = 200
    lacking = torch.zeros(200, 2, dtype=torch.bool)
    lacking[:40, 1] = True
    lacking[100:120, 0] = True
    return torch.arange(200), words, lacking


def test_a_word_is_taken_on_trust_as_often_as_is_usual(claims: tuple[Tensor, Tensor, Tensor]) -> None:
    caption_of, words, lacking = claims
    p = torch.linspace(1e-3, 0, 200)  # the last are believed most
    kept = rarely_unheard(torch.ones(200, dtype=torch.bool), p, caption_of, words, lacking)
    assert kept[40:].all(), "words that each use for themselves cost nobody anything"
    assert torch.nonzero(kept[:40])[:, 0].tolist() == [39], "the most believed one stays, as is usual for a word"


def test_only_what_candidates_say_counts(claims: tuple[Tensor, Tensor, Tensor]) -> None:
    caption_of, words, lacking = claims
    candidates = torch.arange(200) > 37
    kept = rarely_unheard(candidates, torch.zeros(200), caption_of, words, lacking)
    assert not (kept & ~candidates).any()
    assert int(kept[38:40].sum()) == 1


def test_nothing_unheard_keeps_all(claims: tuple[Tensor, Tensor, Tensor]) -> None:
    caption_of, words, lacking = claims
    candidates = torch.arange(200) % 2 == 0
    assert rarely_unheard(candidates, torch.zeros(200), caption_of, words, lacking & False).equal(candidates)
    nobody = torch.zeros(200, dtype=torch.bool)
    assert not rarely_unheard(nobody, torch.zeros(200), caption_of, words, lacking).any()


def test_what_all_words_do_is_usual(claims: tuple[Tensor, Tensor, Tensor]) -> None:
    """An enemy moves the quantile only by as many words: with every word unheard ten times, ten is usual."""
    caption_of, words, _ = claims
    words = words % 20
    lacking = words != NONE
    everyone = torch.ones(200, dtype=torch.bool)
    kept = rarely_unheard(everyone, torch.linspace(0, 1e-3, 200), caption_of, words[:, :1], lacking[:, :1])
    assert kept.all() and np.isclose(module.USUAL, 0.99)


@pytest.fixture
def hearsay() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Captions [200], their words, what is unheard, voters [1, n, 2]: the first fifty use word 200, forty unheard.

    40 to 44 hear it from each other; 45 to 48 from those who use it unheard; 49 from 45.
    """
    words = torch.cat([torch.arange(200)[:, None], torch.full((200, 1), NONE)], dim=1)
    words[:50, 1] = 200
    lacking = torch.zeros(200, 2, dtype=torch.bool)
    lacking[:40, 1] = True
    voters = torch.full((200, 2), 199, dtype=torch.int32)
    voters[40:45, 0] = torch.tensor([41, 42, 43, 44, 40])
    voters[45:49, 0] = torch.arange(4, dtype=torch.int32)
    voters[49, 0] = 45
    return torch.arange(200), words, lacking, voters[None]


def test_who_heard_a_doubtful_word_from_those_it_is_doubtful_of_did_not_hear_it(
    hearsay: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    caption_of, words, lacking, voters = hearsay
    before = lacking.clone()
    found = doubtful(words, words != NONE, caption_of, lacking, voters)
    assert torch.nonzero(found)[:, 0].tolist() == [*range(40), *range(45, 50)]
    assert lacking.equal(before), "what the evidence found is left alone"
    # Every view must bear it out, as everywhere: in a second one 40 to 44 see nobody.
    twice = torch.cat([voters, torch.full_like(voters, 199)])
    assert torch.nonzero(doubtful(words, words != NONE, caption_of, lacking, twice))[:, 0].tolist() == [*range(50)]


def test_a_word_that_most_hear_is_not_doubtful(hearsay: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    caption_of, words, lacking, voters = hearsay
    lacking[24:, 1] = False
    assert not doubtful(words, words != NONE, caption_of, lacking, voters).any()


def test_nor_is_one_that_is_unheard_as_often_as_any(hearsay: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Each word has one user, who is alone with it; and no word at all is no doubt either."""
    caption_of, words, _, voters = hearsay
    words[:, 1] = NONE
    alone = words != NONE
    assert not doubtful(words, words != NONE, caption_of, alone, voters).any()
    nothing = torch.full_like(words, NONE)
    assert not doubtful(nothing, nothing != NONE, caption_of, nothing != NONE, voters).any()
