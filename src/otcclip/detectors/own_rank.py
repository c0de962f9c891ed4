"""Own-caption rank: the share of the caption pool that fits the image at least as well as its own caption, under d.

For a caption that has nothing to do with its image the share is uniform, so it is a p-value (docs/method.md). d is
METHOD section 1's; without comparable local vectors it is the cosine alone.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.matching import match


class OwnRank:
    """Share of the pool at least as near as the own caption, in (0, 1]."""

    name: ClassVar[str] = "own-rank"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("joint",)

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(match(features).own_share)
