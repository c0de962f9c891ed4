"""Caption-wise false discovery rate: how likely a pair's caption is a lie, all witnesses and its caption's record
considered.

Log odds of `evidence.log_odds`: a local false discovery rate (Efron, 2008) whose prior is each caption's own. Poison
is concentrated: it argues for few captions by many pairs. A pair of middling evidence under a caption whose other
pairs look false is likely false; the same evidence under a caption whose other pairs hold is likely an odd but honest
picture.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.evidence import log_odds


class CaptionFdr:
    """log P(lie) - log P(honest)."""

    name: ClassVar[str] = "caption-fdr"
    comparable: ClassVar[bool] = True  # a probability
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(log_odds(features))
