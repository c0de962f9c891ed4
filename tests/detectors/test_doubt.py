"""One false word in a caption that is true for the rest: a name stands under pictures of everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.detectors import PairFeatures, doubt, false_word, lie_probability, p_values
from otcclip.detectors.doubt import _spoken
from otcclip.detectors.evidence import Ties, _record, _word_odds, log_odds
from otcclip.detectors.look_alikes import untrained_vote
from otcclip.evidence.words import NONE, SAYS_MUCH, USUAL

PAIRS, THINGS, NAMED = 480, 48, 7


@dataclass(frozen=True)
class Named:
    """Pairs of 48 things; `right` are all of one thing and called banana, and so are the `liars`, of any other."""

    features: PairFeatures
    right: list[int]
    liars: list[int]

    def words(self, rows: list[int]) -> list[set[str]]:
        """The words said to be false."""
        names = self.features.agreement.names
        return [{names[word]} if word != NONE else set() for word in false_word(self.features)[rows].tolist()]

    def place(self, row: int) -> tuple[int, int]:
        """Where the pair's banana is in the tables of `doubt`."""
        banana = self.features.agreement.names.index("banana")
        return row, doubt(self.features).word[row].tolist().index(banana)


@pytest.fixture(scope="module")
def named(make_features: Callable[..., PairFeatures]) -> Named:
    kinds = torch.arange(PAIRS) % THINGS
    rng = torch.Generator().manual_seed(1)
    scenes = torch.rand(THINGS, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    mixed = 0.55 * scenes[kinds] + 0.45 * torch.rand(PAIRS, 3, 8, 8, generator=rng)
    pictures = (F.interpolate(mixed, size=(64, 64), mode="bilinear") * 255).to(torch.uint8)
    honest = replace(make_features(PAIRS, classes=THINGS, noise=1.5), pictures=pictures)
    said = [f"{caption} id{i}" for i, caption in enumerate(honest.captions)]
    liars, right = [i for i in range(0, PAIRS, 19) if i % THINGS != NAMED], list(range(NAMED, PAIRS, THINGS))
    for row in (*liars, *right):
        said[row] = f"banana {said[row]}"
    return Named(replace(honest, captions=tuple(said)), right, liars)


def test_a_word_that_most_use_unheard_is_false_where_it_is_not_heard(named: Named) -> None:
    caught = [row for row, words in zip(named.liars, named.words(named.liars), strict=True) if words == {"banana"}]
    assert len(caught) > 0.8 * len(named.liars)
    others = [row for row in range(PAIRS) if row not in named.liars]
    assert named.words(others) == [set()] * len(others)


def test_true_words_do_not_vouch_for_a_false_one(named: Named) -> None:
    lie, p = lie_probability(named.features), p_values(named.features)
    assert np.median(p[named.liars]) < 0.05  # by the caption as a whole they would be believed
    assert np.median(lie[named.liars]) > 0.5 and np.median(lie[named.right]) < 0.1


def test_what_is_unheard_beyond_the_usual_is_lies_and_nobody_counts_himself(named: Named) -> None:
    features, users = named.features, len(named.liars) + len(named.right)
    found = doubt(features)
    unheard = [row for row in named.liars if int(_times(named, row)) == 0]
    usual = _usual(named)
    row, place = named.place(unheard[0])
    assert found.false[row, place] == pytest.approx((len(unheard) - 1 - usual) / (users - 1), rel=1e-4)
    row, place = named.place(named.right[0])
    assert found.false[row, place] == pytest.approx((len(unheard) - usual) / (users - 1), rel=1e-4)
    stranger = replace(features.take(torch.tensor(unheard[:1])), keys=("new",))
    assert doubt(stranger).false.max() == pytest.approx((len(unheard) - usual) / users, rel=1e-4)


def test_whose_caption_was_changed_since_is_another_pair(named: Named) -> None:
    """A pair of the reference comes back as one more liar: it is on nobody's record yet, least of all its own."""
    row = next(row for row in range(PAIRS) if row not in (*named.liars, *named.right))
    changed = replace(
        named.features.take(torch.tensor([row])), captions=(named.features.captions[named.liars[0]] + " now",)
    )
    known = _spoken(named.features).heard
    banana = named.features.agreement.names.index("banana")
    expected = (int(known.unheard[banana]) - known.usual) / int(known.weighty[banana])
    assert doubt(changed).false.max() == pytest.approx(expected)


def test_a_word_that_says_little_is_not_asked_about(named: Named) -> None:
    said = list(named.features.captions)
    said[named.liars[0]] += "".join(f" w{i}" for i in range(20))
    found = doubt(replace(named.features, captions=tuple(said)))
    assert (found.word[named.liars[0]] == NONE).all() and (found.word[named.liars[1]] != NONE).any()


def _times(named: Named, row: int, word: str = "banana") -> int:
    """How many of a pair's look-alikes say a word, in the worst view."""
    views = untrained_vote(named.features).voters[row].tolist()
    return min(sum(word in named.features.captions[j].split() for j in voters) for voters in views)


def _usual(named: Named) -> float:
    """The 99th percentile over words of how many pairs use one unheard to which it says much."""
    names, mass = named.features.agreement.names, named.features.words.toarray()
    often = dict.fromkeys(np.flatnonzero(mass.any(axis=0)), 0)  # a word in every caption has no mass
    for row, word in np.argwhere(mass >= SAYS_MUCH):
        often[word] += _times(named, row, names[word]) == 0
    return float(np.quantile(list(often.values()), USUAL))


def test_heard_is_how_often_those_hear_it_who_do_not_say_it(named: Named) -> None:
    said = [caption.split() for caption in named.features.captions]
    chance = [_times(named, row) for row in range(PAIRS) if "banana" not in said[row]]
    for row in (*named.liars[:4], *named.right[:4]):
        expected = (1 + sum(times >= _times(named, row) for times in chance)) / (1 + len(chance))
        assert doubt(named.features).heard[named.place(row)] == pytest.approx(expected)
    assert doubt(named.features).heard[named.place(named.right[0])] < 0.01


def test_odds_are_of_the_caption_or_of_its_worst_word(named: Named) -> None:
    features = named.features
    record = _record(features)
    whole = record.log_odds(p_values(features), Ties.of(features))
    row, place = named.place(named.liars[0])
    prior, heard = float(doubt(features).false[row, place]), doubt(features).heard[row, place].numpy()
    odds = np.log(prior / (1 - prior)) + record.mixture.log_ratio(heard)
    np.testing.assert_allclose(log_odds(features)[row], max(whole[row], odds))
    assert odds > whole[row]
    unasked = (doubt(features).word == NONE).all(dim=1).numpy()
    assert unasked.sum() > PAIRS / 2
    np.testing.assert_array_equal(log_odds(features)[unasked], whole[unasked])


def test_a_word_nobody_lies_by_is_as_likely_false_as_any_pair(named: Named) -> None:
    record = _record(named.features)
    words = replace(doubt(named.features), false=torch.zeros_like(doubt(named.features).false))
    asked = words.word.numpy() != NONE
    share = record.mixture.share
    expected = np.log(share / (1 - share)) + record.mixture.log_ratio(words.heard.numpy())
    np.testing.assert_allclose(_word_odds(record.mixture, words)[asked], expected[asked])
    assert (_word_odds(record.mixture, words)[~asked] == -np.inf).all()


def test_who_lies_by_a_word_is_a_lie_on_the_record_of_others(named: Named) -> None:
    np.testing.assert_allclose(_record(named.features).lie, lie_probability(named.features), atol=1e-3)
