"""DAO: dimensionality-aware outlier detection.

DAO(x) = mean_{o in N_k(x)} LID(o) log(d_k(x) / d_k(o)); Anderberg et al., "Dimensionality-Aware Outlier Detection", SDM
2024, arXiv 2401.05453, equation 11; the best detector of CLIP backdoors in Huang et al., ICLR 2025, arXiv 2502.01385
(k = 16).
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.k_dist import K
from otcclip.detectors.lid import FLOOR, lid


class Dao:
    """DAO of each image against the reference, self excluded there and among the reference's own neighbours."""

    name: ClassVar[str] = "dao"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, k: int = K) -> None:
        self.k = k

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        near, among = features.neighbours(self.k), features.against.neighbours(self.k)
        own, theirs = near.distance[:, -1:].double().clamp_min(FLOOR), among.distance[:, -1].double().clamp_min(FLOOR)
        dimension = lid(among.distance)
        return as_scores((dimension[near.index] * (own / theirs[near.index]).log()).mean(dim=1))
