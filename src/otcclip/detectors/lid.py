"""LID: the local intrinsic dimension of the image's neighbourhood.

LID(x) = -k / sum_i log(d_i(x) / d_k(x)); the maximum-likelihood estimate of Amsaleg et al., "Estimating Local Intrinsic
Dimensionality", KDD 2015, equation 8; as a detector of CLIP backdoors: Huang et al., ICLR 2025, arXiv 2502.01385.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from otcclip.detectors.base import PairFeatures, Scores, as_scores
from otcclip.detectors.k_dist import K

FLOOR = 1e-6  # copies lie at distance 0; their logarithm is kept finite
MOST = 1e4  # all k neighbours at one distance: the estimate diverges


def lid(distance: Tensor) -> Tensor:
    """`distance [n, k]`, ascending -> `[n]`; 0 where all k neighbours are copies (a point has no dimension)."""
    last = distance[:, -1:]
    logs = (distance.double().clamp_min(FLOOR) / last.double().clamp_min(FLOOR)).log().sum(dim=1)
    estimate = torch.where(logs < 0, -distance.shape[1] / logs, torch.full_like(logs, MOST)).clamp(max=MOST)
    return torch.where(last[:, 0] > FLOOR, estimate, torch.zeros_like(estimate))


class Lid:
    """LID of each image in the reference, self excluded."""

    name: ClassVar[str] = "lid"
    comparable: ClassVar[bool] = True  # a dimension
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, k: int = K) -> None:
        self.k = k

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        return as_scores(lid(features.neighbours(self.k).distance))
