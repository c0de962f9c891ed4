"""An ensemble by ranks: the mean, over its members, of the share of reference pairs that are less suspicious.

Ranks because scores of different detectors have no common scale. The members are the detectors whose score is a
p-value of "this caption has nothing to do with this image", by one witness each: what is alike to the encoder, what
looks alike to nobody who was trained, what the pairs that make other claims say, and the encoder's own judgement. That
is a choice on what they measure, not on how they fared. Members that lack what they need are left out.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from otcclip.detectors.base import Detector, PairFeatures, Scores, applies
from otcclip.detectors.claim_left_out import ClaimLeftOut
from otcclip.detectors.neighbour_ot import NeighbourOT
from otcclip.detectors.own_rank import OwnRank
from otcclip.detectors.untrained_neighbour import UntrainedNeighbour

SCALE = 1024  # reference pairs that a score is ranked among: a share is then known to .1 %


class Ensemble:
    """Mean rank share over `members`, each ranked among at most 1,024 reference pairs drawn once by a fixed seed."""

    name: ClassVar[str] = "ensemble"
    comparable: ClassVar[bool] = False  # ranks are relative to the reference
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, members: tuple[Detector, ...] | None = None) -> None:
        default = (NeighbourOT(), UntrainedNeighbour(), ClaimLeftOut(), OwnRank())
        self.members = default if members is None else members

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        members = [member for member in self.members if applies(member, features)]
        scale = rank_scale(features.against)
        shares = [_share_below(member.score(features), scale_of(member, scale)) for member in members]
        return np.asarray(np.mean(shares, axis=0), np.float64)


def rank_scale(against: PairFeatures) -> PairFeatures:
    """The reference pairs that scores are ranked among."""

    def make() -> PairFeatures:
        order = torch.randperm(len(against), generator=torch.Generator().manual_seed(0))
        return against.take(order[:SCALE].sort().values)

    return against.once("rank scale", make)


def scale_of(member: Detector, scale: PairFeatures) -> Scores:
    """The member's sorted scores of the rank scale."""
    return scale.once(f"scores of {member.name}", lambda: np.sort(member.score(scale)))


def _share_below(scores: Scores, known: Scores) -> Scores:
    """Share of `known` (sorted) below each score, ties counted half."""
    left, right = np.searchsorted(known, scores, "left"), np.searchsorted(known, scores, "right")
    out: Scores = (left + right) / (2 * len(known))
    return out
