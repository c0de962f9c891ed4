"""SLOF: simplified local outlier factor, an image's k-distance over those of its neighbours.

SLOF(x) = mean_{o in N_k(x)} d_k(x) / d_k(o); Schubert, Zimek, Kriegel, "Local outlier detection reconsidered", DMKD
2014, section 4.3; as a detector of CLIP backdoors: Huang et al., ICLR 2025, arXiv 2502.01385.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.k_dist import K

FLOOR = 1e-6  # k-distance of a point mass: more than k copies of one image


class Slof:
    """Ratio of k-distances to the reference, self excluded."""

    name: ClassVar[str] = "slof"
    comparable: ClassVar[bool] = True  # a ratio: 1 is as dense as its surroundings
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, k: int = K) -> None:
        self.k = k

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        near = features.neighbours(self.k)
        theirs = features.against.neighbours(self.k).distance[:, -1].clamp_min(FLOOR)
        return as_scores((near.distance[:, -1:] / theirs[near.index]).mean(dim=1))
