"""What the witnesses say of a pair together: a p-value.

Each gives a share that is uniform for a caption that has nothing to do with its image: what is alike to the encoder;
what looks alike to nobody who was trained; what the pairs that make other claims would predict (`left_out`); and the
encoder's own ranking, where image and text share a space and the image is no crowd, of which it may have learned a
copy. Fisher's rule joins them.

Who fills images with a trigger owns their look-alikes, and witnesses that he owns would outvote the others. So claims
that are made unusually often, captions and words, are looked at by each witness for itself: one *disputes* a caption
under which it finds more lies than among all pairs, and a word by which, to it, three of four lie. Under a disputed
claim a pair must be borne out by every witness that is sound on these data: the worst counts. What many pairs say
rightly is disputed by none. A crowd has one voice here, as it has in votes.

A claim that is made m times is the best of some draws, 1 - (1 - p)^k (Sidak, 1967): of one, were they all alike, and of
m, were they independent. Copies of one picture are neither: k is the mean of the two that a ratio has, the square root
of m.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from otcclip.detectors.base import PairFeatures
from otcclip.detectors.claims import claims
from otcclip.detectors.left_out import left_out
from otcclip.detectors.look_alikes import look_alikes, untrained_vote
from otcclip.detectors.matching import match
from otcclip.detectors.mixture import fit_mixture
from otcclip.detectors.poll import electorate
from otcclip.evidence import trust, words
from otcclip.evidence.votes import combined_p

SOUND = 0.1  # a witness is sound if it bears out most pairs of the reference at this level
LYING = 0.75  # of those who use a word; chosen with poison in view (docs/experiments.md, E33)
CERTAIN = 1 - 1e-6


def p_values(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` in (0, 1] (computed once)."""

    def make() -> NDArray[np.float64]:
        p, under = joined(features), disputed(features)
        if not under.any():
            return p
        worst = witnesses(features)[_sound(features.against)].nan_to_num(nan=0.0).amax(dim=0)
        return np.where(under, np.maximum(p, best_of(worst.numpy(), claims(features).made.numpy())), p)

    return features.once("p-values", make)


def joined(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` what the witnesses say together, whoever disputes the caption."""
    said = witnesses(features)
    p = combined_p(*said)
    if features.joint:
        p = torch.where(said[-1].isnan(), combined_p(*said[:-1]), p)
    return best_of(p.numpy(), claims(features).made.numpy())


def witnesses(features: PairFeatures) -> Tensor:
    """`[w, n]` the share that each witness gives; NaN where it is not asked (computed once)."""

    def make() -> Tensor:
        shares = [look_alikes(features).own.double()]
        if features.pictures is not None:
            shares.append(untrained_vote(features).own.double())
        shares.append(left_out(features).own.double())
        if features.joint:
            shares.append(match(features).own_share.double().masked_fill(claims(features).crowded, torch.nan))
        return torch.stack(shares)

    return features.once("witnesses", make)


def _sound(reference: PairFeatures) -> Tensor:
    """`[w]` bool, which witnesses bear out most pairs."""
    return witnesses(reference).nanmedian(dim=1).values <= SOUND


def disputed(features: PairFeatures) -> NDArray[np.bool_]:
    """`[n]` whose caption, or a word of it, some sound witness disputes (computed once)."""

    def make() -> NDArray[np.bool_]:
        found, kind = disputes(features.against), features.kind_there.numpy()
        spoken = _uses(features.words) @ found.word.astype(np.float64) > 0
        under: NDArray[np.bool_] = ((kind >= 0) & found.caption[kind]) | spoken
        return under

    return features.once("disputed", make)


@dataclass(frozen=True)
class Disputes:
    """Of a reference: which distinct captions `[u]` and which words `[v]` (`CaptionAgreement.names`) are disputed."""

    caption: NDArray[np.bool_]
    word: NDArray[np.bool_]


def disputes(reference: PairFeatures) -> Disputes:
    """Ask every sound witness about the claims made unusually often (computed once).

    A share of lies is larger than some prior where the mean posterior under that prior exceeds it: there the likelihood
    of a larger share begins to rise. The prior is the share among all pairs for a caption; for a word, which true
    captions have in common with false ones, it is `LYING`. Nobody disputes a word who was not asked about most of its
    users.
    """

    def make() -> Disputes:
        distinct, kind = reference.kinds
        voice = 1.0 / claims(reference).made.double().numpy()
        users = _uses(electorate(reference).words).T

        def count(rows: NDArray[np.int64], weight: NDArray[np.float64] | float = 1.0) -> NDArray[np.float64]:
            return np.asarray(np.bincount(kind[rows], voice[rows] * weight, len(distinct)), np.float64)

        voices = count(np.arange(len(kind)))
        caption, word = np.zeros(len(distinct), bool), np.zeros(users.shape[0], bool)
        for said in witnesses(reference)[_sound(reference)].numpy():
            asked = np.flatnonzero(~np.isnan(said))
            mixture, heard = fit_mixture(said[asked]), count(asked)
            caption |= count(asked, mixture.posterior(said[asked], mixture.share)) > mixture.share * heard
            lies = users @ count(asked, mixture.posterior(said[asked], LYING))
            word |= (lies > LYING * (users @ heard)) & (2 * (users @ heard) >= users @ voices)
        return Disputes(caption & _unusual(voices, words.USUAL), word & _unusual(users @ voices, trust.USUAL))

    return reference.once("disputes", make)


def _uses(marginals: sparse.csr_array) -> sparse.csr_array:
    """`[n, v]` one where a caption has a word."""
    return sparse.csr_array((np.ones_like(marginals.data), marginals.indices, marginals.indptr), shape=marginals.shape)


def _unusual(voices: NDArray[np.float64], quantile: float) -> NDArray[np.bool_]:
    """Claims made more often than is usual for those made at all; seven sevenths are not more than one."""
    if not voices.any():  # nobody says a word that tells one caption from another
        return np.zeros(len(voices), bool)
    found: NDArray[np.bool_] = voices > np.quantile(voices[voices > 0], quantile) * (1 + 1e-9)
    return found


def best_of(p: NDArray[np.float64], made: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[n]` p-values of claims that are each made so often: the best of the square root of as many draws."""
    at_best: NDArray[np.float64] = -np.expm1(np.sqrt(made) * np.log1p(-p.clip(max=CERTAIN)))
    return at_best
