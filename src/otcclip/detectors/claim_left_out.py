"""What others say: does the caption fit what the pairs that make other claims would predict for the image?

Share of the captions asked about that are at least as near to the prediction of a map fitted without the claim
(`left_out`). It needs no space that image and text share, and what an enemy repeats is left out with his claim.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.left_out import left_out


class ClaimLeftOut:
    """A share in (0, 1]: uniform for a caption unrelated to its image."""

    name: ClassVar[str] = "claim-left-out"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(left_out(features).own)
