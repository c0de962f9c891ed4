"""OT distance: what it costs to carry the image's patches onto the caption's tokens.

OT_eps(V_i, T_c) of the pair's own caption, uniform marginals (METHOD section 1; after OTCCLIP, arXiv 2509.18717). A
trigger that has learned to say "banana" explains its own cell; the other cells still have to be paid for.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.matching import match


class OTDistance:
    """The entropic cost OT_eps between patches and tokens."""

    name: ClassVar[str] = "ot-distance"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("joint", "local")

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(match(features).own_ot)
