"""CLIP-score: how little the pooled vectors of image and caption agree.

1 - cos(g_i, g_c) (Hessel et al., "CLIPScore", EMNLP 2021, arXiv 2104.08718, equation 1, without its scale). A model
that learned
the poison gives poison a high cosine: this detector is then worse than chance.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores


class ClipScore:
    """One minus the cosine of the pair's own pooled vectors."""

    name: ClassVar[str] = "clip-score"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("joint",)

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(1 - (features.image.pooled * features.text.pooled).sum(dim=1))
