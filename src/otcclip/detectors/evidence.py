"""The probability that a pair's caption is a lie, of what all witnesses say of it and of what it has in common with
others.

lie: P(unrelated | p) = pi f0 / (pi f0 + (1 - pi) f1) with the two groups of `mixture`: a local false discovery rate.
The prior `pi` is each pair's own, since poison is concentrated: the worst record of what it has in common with others,
its caption and its crowd. A record is the posteriors of the *other* pairs, shrunk towards the overall share by the
weight of one pair. Posteriors and priors are iterated until they agree.

A caption also lies if one of its words does, whatever the rest of it says: the odds of a doubtful word are made in the
same way, of the share of lies among those who use it and of how well the pair heard it (`detectors.doubt`), and the
worst odds count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit

from otcclip.detectors.base import PairFeatures
from otcclip.detectors.claims import claims
from otcclip.detectors.doubt import Doubt, doubt
from otcclip.detectors.mixture import ROUNDS, Mixture, fit_mixture
from otcclip.detectors.witnesses import CERTAIN, joined, p_values
from otcclip.evidence.words import NONE

SHRINK = 1.0  # pairs' worth of the overall share in a caption's prior


@dataclass(frozen=True)
class Ties:
    """What `n` pairs have in common with those of the reference.

    Attributes:
        kind, place: `[n]` int64, the caption and the pair itself in the reference; -1 outside it.
        crowd: `[n, m]` bool.
    """

    kind: NDArray[np.int64]
    place: NDArray[np.int64]
    crowd: sparse.csr_array

    @classmethod
    def of(cls, features: PairFeatures) -> Ties:
        return cls(features.kind_there.numpy(), features.record_index.numpy(), claims(features).crowd)


@dataclass(frozen=True)
class Record:
    """Of the reference: the mixture, each pair's posterior `[m]`, and their sum and number by distinct caption."""

    mixture: Mixture
    lie: NDArray[np.float64]
    lies: NDArray[np.float64]
    pairs: NDArray[np.int64]

    def prior(self, ties: Ties) -> NDArray[np.float64]:
        """`[n]`, each pair's own posterior left out."""
        inside, known = ties.place >= 0, ties.kind >= 0
        others = np.where(known, self.lies[ties.kind] - np.where(inside, self.lie[ties.place], 0.0), 0.0)
        caption = self._shrunk(others, np.where(known, self.pairs[ties.kind] - inside, 0))
        members = np.diff(ties.crowd.indptr)
        crowd = np.where(members > 0, self._shrunk(ties.crowd @ self.lie, members), 0.0)
        worst: NDArray[np.float64] = np.maximum(caption, crowd).clip(1 - CERTAIN, CERTAIN)
        return worst

    def _shrunk(self, lies: NDArray[Any], pairs: NDArray[Any]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = (SHRINK * self.mixture.share + lies) / (SHRINK + pairs)
        return out

    def log_odds(self, p: NDArray[np.float64], ties: Ties) -> NDArray[np.float64]:
        """`[n]` log odds of a lie, of the caption as a whole."""
        out: NDArray[np.float64] = logit(self.prior(ties)) + self.mixture.log_ratio(p)
        return out


def log_odds(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` log odds of "this caption has nothing to do with this image", or a word of it (computed once)."""

    def make() -> NDArray[np.float64]:
        record = _record(features.against)
        return np.maximum(record.log_odds(p_values(features), Ties.of(features)), _worst_word(record.mixture, features))

    return features.once("log odds", make)


def _worst_word(mixture: Mixture, features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` log odds of the worst word of each caption; -inf where no pictures were kept: then nobody doubts words."""
    if features.pictures is None:
        return np.full(len(features), -np.inf)
    worst: NDArray[np.float64] = _word_odds(mixture, doubt(features)).max(axis=1)
    return worst


def _word_odds(mixture: Mixture, words: Doubt) -> NDArray[np.float64]:
    """`[n, l]` log odds that a word is false; -inf where none is doubtful."""
    prior = np.maximum(words.false.numpy(), mixture.share).clip(1 - CERTAIN, CERTAIN)
    odds = logit(prior) + mixture.log_ratio(words.heard.numpy())
    out: NDArray[np.float64] = np.where(words.word.numpy() == NONE, -np.inf, odds)
    return out


def _record(against: PairFeatures) -> Record:
    """Posteriors and priors of the reference made to agree, by expectation-maximisation."""

    def make() -> Record:
        p, (kinds, kind), ties = p_values(against), against.kinds, Ties.of(against)
        mixture = fit_mixture(joined(against))  # uniform under a lie, as the worst of several is not
        word = _worst_word(mixture, against)
        pairs = np.bincount(kind, minlength=len(kinds)).astype(np.int64)
        lie = mixture.posterior(p, mixture.share)
        record = Record(mixture, lie, _sum_by(kind, lie, len(kinds)), pairs)
        for _ in range(ROUNDS):
            lie = _sigmoid(np.maximum(record.log_odds(p, ties), word))
            record = Record(mixture, lie, _sum_by(kind, lie, len(kinds)), pairs)
        return record

    return against.once("record", make)


def _sum_by(kind: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return np.asarray(np.bincount(kind, values, count), np.float64)


def lie_probability(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` in 0..1."""
    return _sigmoid(log_odds(features))


def false_word(features: PairFeatures) -> NDArray[np.int64]:
    """`[n]` the word of each caption (`CaptionAgreement.names`) that is likeliest false, where it is likelier so than
    not; else `NONE`.

    Raises:
        ValueError: the features were kept without pictures.
    """
    words = doubt(features)
    odds = _word_odds(_record(features.against).mixture, words)
    worst = odds.argmax(axis=1)[:, None]
    found = np.take_along_axis(words.word.numpy(), worst, axis=1)
    out: NDArray[np.int64] = np.where(np.take_along_axis(odds, worst, axis=1) > 0, found, NONE)[:, 0]
    return out


def lies_by_caption(reference: PairFeatures) -> NDArray[np.float64]:
    """`[u]`: how likely a pair of the reference under each of its distinct captions is a lie, on the mean."""
    record = _record(reference)
    return record.lies / record.pairs


def _sigmoid(odds: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = expit(odds)
    return out
