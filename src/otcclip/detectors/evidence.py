"""What all witnesses say of a pair together: a p-value, and from it the probability that its caption is a lie.

p: what is alike to the encoder gives one share, what looks alike to nobody who was trained another, the encoder's own
ranking a third (where image and text share a space, and the image is no crowd, of which it may have learned a copy).
For a caption that has nothing to do with its image each is uniform; Fisher's rule joins them. Who fills images with a
trigger owns their look-alikes, and one witness that he owns would outvote the others: a caption under more pairs than
is usual must be borne out by every witness that is sound on these data, and the worst counts. A claim that is made m
times is the best of some draws, 1 - (1 - p)^k (Sidak, 1967): of one, were they all alike, and of m, were they
independent. Copies of one picture are neither: k is the mean of the two that a ratio has, the square root of m.

lie: P(unrelated | p) = pi f0 / (pi f0 + (1 - pi) f1) with f0 = 1 (uniform) and f1 = a p^(a - 1). Two groups, one
uniform and one piled up at 0: Efron's local false discovery rate ("Microarrays, Empirical Bayes and the Two-Groups
Model", Statistical Science 2008), f1 as in Pounds and Morris (Bioinformatics 2003), the share of lies among all
pairs as estimated by Storey (JRSS B 2002): pairs with p above one half, doubled. The prior `pi` is each pair's own,
since poison is concentrated: the worst record of what it has in common with others, its caption and its crowd. A
record is the posteriors of the *other* pairs, shrunk towards the overall share by the weight of one pair. Posteriors
and priors are iterated until they agree.

A caption also lies if one of its words does, whatever the rest of it says: the odds of a doubtful word are made in the
same way, of the share of lies among those who use it and of how well the pair heard it (`detectors.doubt`), and the
worst odds count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import expit, logit
from torch import Tensor

from otcclip.detectors.base import PairFeatures
from otcclip.detectors.claims import claims
from otcclip.detectors.doubt import Doubt, doubt
from otcclip.detectors.look_alikes import look_alikes, untrained_vote
from otcclip.detectors.matching import match
from otcclip.evidence.votes import combined_p
from otcclip.evidence.words import NONE, USUAL

LAMBDA = 0.5
SHRINK = 1.0  # pairs' worth of the overall share in a caption's prior
LEAST, MOST = 1e-5, 1 - 1e-6
SOUND = 0.05  # a witness is sound if it bears out most pairs of the reference at this level
ROUNDS = 20  # of each of the two expectation-maximisations; both have settled by then


@dataclass(frozen=True)
class Mixture:
    """The two groups: `share` of lies among all pairs, `a` of the honest pairs' density a p^(a - 1)."""

    share: float
    a: float

    def log_ratio(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """log f0 / f1."""
        out: NDArray[np.float64] = -np.log(self.a) - (self.a - 1) * np.log(p.clip(LEAST, 1))
        return out

    def posterior(self, p: NDArray[np.float64], prior: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """P(lie | p) under a prior share of lies."""
        odds: NDArray[np.float64] = logit(prior) + self.log_ratio(p)
        return _sigmoid(odds)

    def word_odds(self, words: Doubt) -> NDArray[np.float64]:
        """`[n, l]` log odds that a word is false; -inf where none is doubtful."""
        prior = np.maximum(words.false.numpy(), self.share).clip(1 - MOST, MOST)
        odds = logit(prior) + self.log_ratio(words.heard.numpy())
        out: NDArray[np.float64] = np.where(words.word.numpy() == NONE, -np.inf, odds)
        return out


def fit_mixture(p: NDArray[np.float64]) -> Mixture:
    """Storey's share, then `a` by expectation-maximisation with that share held fixed."""
    p = p.clip(LEAST, 1)
    share = float(np.clip((p > LAMBDA).mean() / (1 - LAMBDA), 1e-4, 0.99))
    a = 0.3
    for _ in range(ROUNDS):
        honest = 1 - Mixture(share, a).posterior(p, share)
        a = float(np.clip(honest.sum() / max(1e-9, -(honest * np.log(p)).sum()), 0.01, 0.99))
    return Mixture(share, a)


def p_values(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` in (0, 1] (computed once)."""

    def make() -> NDArray[np.float64]:
        p = _joined(features)
        sound = _witnesses(features.against).nanmedian(dim=1).values <= SOUND
        if not sound.any():
            return p
        worst = _witnesses(features)[sound].nan_to_num(nan=0.0).amax(dim=0)
        return np.where(_often_made(features), np.maximum(p, best_of(worst.numpy(), claims(features).made.numpy())), p)

    return features.once("p-values", make)


def _joined(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` what the witnesses say together, whoever makes the claim."""
    said = _witnesses(features)
    p = combined_p(*said)
    if features.joint:
        p = torch.where(said[-1].isnan(), combined_p(*said[:-1]), p)
    return best_of(p.numpy(), claims(features).made.numpy())


def _witnesses(features: PairFeatures) -> Tensor:
    """`[w, n]` the share that each witness gives; NaN where it is not asked."""

    def make() -> Tensor:
        shares = [look_alikes(features).own.double()]
        if features.pictures is not None:
            shares.append(untrained_vote(features).own.double())
        if features.joint:
            shares.append(match(features).own_share.double().masked_fill(claims(features).crowded, torch.nan))
        return torch.stack(shares)

    return features.once("witnesses", make)


def _often_made(features: PairFeatures) -> NDArray[np.bool_]:
    """`[n]` whether a caption stands under more pairs of the reference than is usual for a caption."""
    pairs, kind = np.bincount(features.against.kinds[1]), features.kind_there.numpy()
    often: NDArray[np.bool_] = (kind >= 0) & (pairs > np.quantile(pairs, USUAL))[kind]
    return often


def best_of(p: NDArray[np.float64], made: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[n]` p-values of claims that are each made so often: the best of the square root of as many draws."""
    at_best: NDArray[np.float64] = -np.expm1(np.sqrt(made) * np.log1p(-p.clip(max=MOST)))
    return at_best


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
        worst: NDArray[np.float64] = np.maximum(caption, crowd).clip(1 - MOST, MOST)
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
    worst: NDArray[np.float64] = mixture.word_odds(doubt(features)).max(axis=1)
    return worst


def _record(against: PairFeatures) -> Record:
    """Posteriors and priors of the reference made to agree, by expectation-maximisation."""

    def make() -> Record:
        p, (kinds, kind), ties = p_values(against), against.kinds, Ties.of(against)
        mixture = fit_mixture(_joined(against))  # uniform under a lie, as the worst of several is not
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
    odds = _record(features.against).mixture.word_odds(words)
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
