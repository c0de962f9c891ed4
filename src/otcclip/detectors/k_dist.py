"""k-dist: how far an image lies from its k-th nearest neighbour.

d_k(x), Euclidean between unit vectors of the image tower; Ramaswamy, Rastogi, Shim, "Efficient Algorithms for Mining
Outliers from Large Data Sets", SIGMOD 2000, definition 1. For CLIP: Huang et al., "Detecting Backdoor Samples in
Contrastive Language Image Pretraining", ICLR 2025, arXiv 2502.01385, section 3: backdoor images lie in sparse
regions.
"""

from __future__ import annotations

from typing import ClassVar

from otcclip.detectors.base import PairFeatures, Scores, as_scores

K = 16  # as in the paper's experiments


class KDist:
    """d_k of each image to the reference, self excluded."""

    name: ClassVar[str] = "k-dist"
    comparable: ClassVar[bool] = False  # depends on the density of the data set
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, k: int = K) -> None:
        self.k = k

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(features.neighbours(self.k).distance[:, -1])
