"""Detectors, one a file: a score a pair, higher = more suspicious.

    detector = make("neighbour-ot")
    detector.score(features)            # [n], against features.reference

A new detector is one file with a class like `KDist` and one entry in `DETECTORS`; tests/contracts holds it to the
contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from otcclip import registry
from otcclip.detectors.base import Detector, PairFeatures, Scores, applies
from otcclip.detectors.caption_fdr import CaptionFdr
from otcclip.detectors.claim_left_out import ClaimLeftOut
from otcclip.detectors.claims import Claims, claims
from otcclip.detectors.clip_score import ClipScore
from otcclip.detectors.conflicting_captions import ConflictingCaptions
from otcclip.detectors.dao import Dao
from otcclip.detectors.doubt import Doubt, doubt
from otcclip.detectors.duplicate_captions import DuplicateCaptions
from otcclip.detectors.ensemble import Ensemble
from otcclip.detectors.evidence import false_word, lie_probability, lies_by_caption
from otcclip.detectors.gmm import Gmm
from otcclip.detectors.k_dist import KDist
from otcclip.detectors.lid import Lid
from otcclip.detectors.look_alikes import LookAlikes, look_alikes, untrained_vote
from otcclip.detectors.matching import Match, match, pool
from otcclip.detectors.neighbour_ot import NeighbourOT
from otcclip.detectors.ot_distance import OTDistance
from otcclip.detectors.own_rank import OwnRank
from otcclip.detectors.slof import Slof
from otcclip.detectors.untrained_neighbour import UntrainedNeighbour
from otcclip.detectors.witnesses import disputed, p_values

DETECTORS: Mapping[str, type[Any]] = registry.registry(
    "detector",
    (
        OTDistance,
        OwnRank,
        NeighbourOT,
        UntrainedNeighbour,
        ClaimLeftOut,
        CaptionFdr,
        ClipScore,
        KDist,
        Slof,
        Lid,
        Dao,
        Gmm,
        ConflictingCaptions,
        DuplicateCaptions,
        Ensemble,
    ),
)


def make(name: str, /, **options: Any) -> Detector:
    """The detector registered as `name`, with its constructor's options.

    Raises:
        UserError: an unknown name or option.
    """
    detector: Detector = registry.make("detector", DETECTORS, name, **options)
    return detector


__all__ = [
    "DETECTORS",
    "Claims",
    "Detector",
    "Doubt",
    "LookAlikes",
    "Match",
    "PairFeatures",
    "Scores",
    "applies",
    "claims",
    "disputed",
    "doubt",
    "false_word",
    "lie_probability",
    "lies_by_caption",
    "look_alikes",
    "make",
    "match",
    "p_values",
    "pool",
    "untrained_vote",
]
