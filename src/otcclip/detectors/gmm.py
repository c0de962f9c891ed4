"""Gaussian mixture on the cosine: the posterior of the component with the lower mean.

SafeCLIP's split (Yang, Gao, Mirzasoleiman, "Better Safe than Sorry", ICML 2024, arXiv 2310.05862, section 4.2): a
mixture of two Gaussians is fitted to the cosines of all pairs; a pair is safe where the posterior of the higher
component is at least .9. Fitted on the reference, applied to each pair.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

from otcclip.detectors.base import PairFeatures, Scores


class Gmm:
    """log P(low) - log P(high) of the pair's cosine: the posterior's log odds, which do not saturate as it does."""

    name: ClassVar[str] = "gmm"
    comparable: ClassVar[bool] = False  # relative to the two components of this data set
    needs: ClassVar[tuple[str, ...]] = ("joint",)

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        known = _cosine(features.against)
        if len(known) < 2 or np.ptp(known) == 0:
            return np.zeros(len(features))
        mixture = GaussianMixture(2, random_state=0, reg_covar=1e-6).fit(known)
        # Between the means the odds fall as the cosine rises. Beyond them the wider Gaussian wins on both sides, and a
        # pair of very high cosine would look suspicious: cosines are clamped to where the odds still fall.
        grid = np.linspace(known.min(), known.max(), 512)
        odds = _odds(mixture, grid)
        top = int(np.argmax(odds))
        bottom = top + int(np.argmin(odds[top:]))
        return _odds(mixture, _cosine(features)[:, 0].clip(grid[top], grid[bottom]))


def _cosine(features: PairFeatures) -> NDArray[np.float64]:
    cosine: NDArray[np.float64] = (features.image.pooled * features.text.pooled).sum(dim=1).double().numpy()[:, None]
    return cosine


def _odds(mixture: GaussianMixture, cosine: NDArray[np.float64]) -> Scores:
    """log P(low | cosine) - log P(high | cosine), from the densities: a posterior rounds to 0 or 1."""
    spread = np.sqrt(mixture.covariances_[:, 0, 0])
    log = np.log(mixture.weights_) + norm.logpdf(cosine[:, None], mixture.means_[:, 0], spread)
    low = int(np.argmin(mixture.means_[:, 0]))
    out: Scores = log[:, low] - log[:, 1 - low]
    return out
