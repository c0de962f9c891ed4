"""Neighbour disagreement by OT: do an image's look-alikes carry captions like its own?

The share of captions that the look-alikes like at least as well as the pair's own, over ten views, times the number
of pairs that make the same claim (docs/method.md, "Look-alikes"; METHOD section 2.2). Agreement of captions is 1 - OT
between their words. For a caption unrelated to its image the share is uniform in each view. Constants: `look_alikes`.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.claims import claims
from otcclip.detectors.look_alikes import look_alikes


class NeighbourOT:
    """share x copies: a bound on a p-value, so it may exceed one."""

    name: ClassVar[str] = "neighbour-ot"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(look_alikes(features).own.double() * claims(features).made)
