"""What all witnesses say of a pair together: a p-value, and from it the probability that its caption is a lie.

p: look-alikes give one share, the encoder's own ranking another (where image and text share a space). For a caption
that has nothing to do with its image each is uniform; Fisher's rule joins them, and a claim made by m copies of an
image is held to m p (docs/method.md).

lie: P(unrelated | p) = pi f0 / (pi f0 + (1 - pi) f1) with f0 = 1 (uniform) and f1 = a p^(a - 1). Two groups, one
uniform and one piled up at 0: Efron's local false discovery rate ("Microarrays, Empirical Bayes and the Two-Groups
Model", Statistical Science 2008), f1 as in Pounds and Morris (Bioinformatics 2003), the share of lies among all
pairs as estimated by Storey (JRSS B 2002): pairs with p above one half, doubled. The prior `pi` is each caption's
own, since poison is concentrated on the captions it argues for: the posteriors of the *other* pairs under that
caption, shrunk towards the overall share by the weight of one pair. Posteriors and priors are iterated until they
agree. Nothing here was chosen by looking at poison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from otcclip.detectors.base import PairFeatures
from otcclip.detectors.look_alikes import look_alikes
from otcclip.detectors.matching import match
from otcclip.evidence.votes import combined_p

LAMBDA = 0.5
SHRINK = 1.0  # pairs' worth of the overall share in a caption's prior
LEAST, MOST = 1e-5, 1 - 1e-6
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
        odds: NDArray[np.float64] = np.log(prior) - np.log1p(-np.asarray(prior)) + self.log_ratio(p)
        return _sigmoid(odds)


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
        seen = look_alikes(features)
        shares = [seen.own.double()]
        if features.joint:
            shares.append(match(features).own_share.double())
        joined: NDArray[np.float64] = (combined_p(*shares) * seen.copies).clamp(max=1.0).numpy()
        return joined

    return features.once("p-values", make)


@dataclass(frozen=True)
class Record:
    """Of the reference: the mixture, each pair's posterior `[m]`, and their sum and number by distinct caption."""

    mixture: Mixture
    lie: NDArray[np.float64]
    lies: NDArray[np.float64]
    pairs: NDArray[np.int64]

    def log_odds(
        self, p: NDArray[np.float64], kind: NDArray[np.int64], place: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """`[n]`, the pair's own posterior left out of its prior; `kind`, `place` are -1 outside the reference."""
        inside, known = place >= 0, kind >= 0
        # A caption that was changed since stands for another pair in the record.
        others = np.where(known, self.lies[kind] - np.where(inside, self.lie[place], 0.0), 0.0)
        count = np.where(known, self.pairs[kind] - inside, 0)
        prior = ((SHRINK * self.mixture.share + others) / (SHRINK + count)).clip(1 - MOST, MOST)
        out: NDArray[np.float64] = np.log(prior) - np.log1p(-prior) + self.mixture.log_ratio(p)
        return out


def log_odds(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` log odds of "this caption has nothing to do with this image" (computed once)."""

    def make() -> NDArray[np.float64]:
        against = features.against
        kinds = {caption: i for i, caption in enumerate(against.kinds[0])}
        kind = np.array([kinds.get(caption, -1) for caption in features.captions], np.int64)
        place = features.self_index.numpy().copy()
        place[(place >= 0) & (against.kinds[1][place] != kind)] = -1
        return _record(against).log_odds(p_values(features), kind, place)

    return features.once("log odds", make)


def _record(against: PairFeatures) -> Record:
    """Posteriors and priors of the reference made to agree, by expectation-maximisation."""

    def make() -> Record:
        p, (kinds, kind) = p_values(against), against.kinds
        mixture = fit_mixture(p)
        pairs = np.bincount(kind, minlength=len(kinds)).astype(np.int64)
        lie, everyone = mixture.posterior(p, mixture.share), np.arange(len(p))
        record = Record(mixture, lie, _sum_by(kind, lie, len(kinds)), pairs)
        for _ in range(ROUNDS):
            lie = _sigmoid(record.log_odds(p, kind, everyone))
            record = Record(mixture, lie, _sum_by(kind, lie, len(kinds)), pairs)
        return record

    return against.once("record", make)


def _sum_by(kind: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return np.asarray(np.bincount(kind, values, count), np.float64)


def lie_probability(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` in 0..1."""
    return _sigmoid(log_odds(features))


def _sigmoid(odds: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = expit(odds)
    return out
