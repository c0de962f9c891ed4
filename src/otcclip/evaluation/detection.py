"""How well scores tell poison from honest pairs. Higher = more suspicious, as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


@dataclass(frozen=True)
class Detection:
    """Detection of poison by a score.

    Attributes:
        auroc: probability that a poison pair scores above an honest one, ties counted half.
        aupr: average precision; its chance level is the share of poison, not one half.
        fpr95: least share of honest pairs flagged by a threshold that flags at least 95 % of the poison.
        poison, honest: number of pairs of each kind.
    """

    auroc: float
    aupr: float
    fpr95: float
    poison: int
    honest: int


def detection(
    scores: NDArray[np.floating] | Sequence[float], is_poison: NDArray[np.bool_] | Sequence[bool]
) -> Detection:
    """AUROC, AUPR and FPR at 95 % TPR of `scores` `[n]` (higher = more suspicious) against `is_poison` `[n]`.

    Raises:
        ValueError: lengths differ, a score is not finite, or one of the two kinds is missing.
    """
    score, truth = np.asarray(scores, dtype=np.float64), np.asarray(is_poison, dtype=bool)
    if score.ndim != 1 or score.shape != truth.shape:
        raise ValueError(f"detection: scores {score.shape}, is_poison {truth.shape}")
    if not np.isfinite(score).all():
        raise ValueError("detection: a score is not finite")
    poison = int(truth.sum())
    if poison in (0, len(truth)):
        raise ValueError(f"detection: {poison} of {len(truth)} pairs are poison; it takes both kinds")
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    return Detection(
        auroc=float(roc_auc_score(truth, score)),
        # Its running sum may end a rounding error above one.
        aupr=min(1.0, float(average_precision_score(truth, score))),
        fpr95=float(fpr[tpr >= 0.95].min()),
        poison=poison,
        honest=len(truth) - poison,
    )
