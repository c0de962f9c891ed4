"""Untrained neighbour disagreement: do images that look alike, to nobody who was trained, carry captions like its own?

The evidence of training (docs/method.md, "Look-alikes"): sixteen voters by oriented gradients and colours, the worst of
thirteen views, times the number of pairs that make the same claim. For a caption unrelated to its image the share is
uniform in each view.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.claims import claims
from otcclip.detectors.look_alikes import untrained_vote


class UntrainedNeighbour:
    """share x copies: a bound on a p-value, so it may exceed one."""

    name: ClassVar[str] = "untrained-neighbour"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("pictures",)

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(untrained_vote(features).own.double() * claims(features).made)
