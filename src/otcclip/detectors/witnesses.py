"""What the witnesses say of a pair together: a p-value.

Each gives a share that is uniform for a caption that has nothing to do with its image: what is alike to the encoder;
what looks alike to nobody who was trained; what the pairs that make other claims would predict (`left_out`); and the
encoder's own ranking, where image and text share a space and the image is no crowd, of which it may have learned a
copy. Fisher's rule joins them.

Who fills images with a trigger owns their look-alikes, and witnesses that he owns would outvote the others. So a
caption under more pairs than is usual is looked at by each witness for itself. One that finds more lies under it than
among all pairs *disputes* it, and under a disputed caption a pair must be borne out by every witness that is sound on
these data: the worst counts. A caption that many pairs carry rightly is disputed by none.

A claim that is made m times is the best of some draws, 1 - (1 - p)^k (Sidak, 1967): of one, were they all alike, and of
m, were they independent. Copies of one picture are neither: k is the mean of the two that a ratio has, the square root
of m.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.detectors.base import PairFeatures
from otcclip.detectors.claims import claims
from otcclip.detectors.left_out import left_out
from otcclip.detectors.look_alikes import look_alikes, untrained_vote
from otcclip.detectors.matching import match
from otcclip.detectors.mixture import fit_mixture
from otcclip.evidence.votes import combined_p
from otcclip.evidence.words import USUAL

SOUND = 0.1  # a witness is sound if it bears out most pairs of the reference at this level
CERTAIN = 1 - 1e-6


def p_values(features: PairFeatures) -> NDArray[np.float64]:
    """`[n]` in (0, 1] (computed once)."""

    def make() -> NDArray[np.float64]:
        p, kind = joined(features), features.kind_there.numpy()
        sound, there = _sound(features.against), disputed(features.against)
        under = (kind >= 0) & there[kind]
        if not under.any():
            return p
        worst = witnesses(features)[sound].nan_to_num(nan=0.0).amax(dim=0)
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


def disputed(reference: PairFeatures) -> NDArray[np.bool_]:
    """`[u]` which distinct captions stand under more pairs than is usual for a caption, and more of those are lies to
    some sound witness than of all pairs (computed once).

    Judged with the share of lies among all pairs as the prior, which is where the likelihood of a larger share under
    this caption begins to rise: it does so where the mean posterior exceeds the prior.
    """

    def make() -> NDArray[np.bool_]:
        distinct, kind = reference.kinds
        pairs = np.bincount(kind, minlength=len(distinct))
        out = np.zeros(len(distinct), bool)
        for said in witnesses(reference)[_sound(reference)].numpy():
            asked = ~np.isnan(said)
            mixture = fit_mixture(said[asked])
            lies = np.bincount(kind[asked], mixture.posterior(said[asked], mixture.share), len(distinct))
            out |= lies > mixture.share * np.bincount(kind[asked], minlength=len(distinct))
        found: NDArray[np.bool_] = out & (pairs > np.quantile(pairs, USUAL))
        return found

    return reference.once("disputed", make)


def best_of(p: NDArray[np.float64], made: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[n]` p-values of claims that are each made so often: the best of the square root of as many draws."""
    at_best: NDArray[np.float64] = -np.expm1(np.sqrt(made) * np.log1p(-p.clip(max=CERTAIN)))
    return at_best
