"""Linear probe: how much of an image's class a straight cut through frozen features tells.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, arXiv 2103.00020,
section 3.2 and appendix A.3: logistic regression (L-BFGS) on the image tower's features, its strength of regularisation
chosen on a validation part. Here that part is a quarter of the probe's training part, and the features are the pooled
unit vectors of the joint space, those that every other measure reads.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor

from otcclip.evaluation.intervals import Rate

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)  # inverse regularisation; unit vectors in 128 dimensions want little of it
VALIDATION = 0.25
MAX_STEPS = 1000


@dataclass(frozen=True)
class Probe:
    """`accuracy` on the test part; `trained` images of `classes` classes, inverse regularisation `strength`."""

    accuracy: Rate
    trained: int
    classes: int
    strength: float


def linear_probe(
    train_features: Tensor, train_labels: Sequence[str], test_features: Tensor, test_labels: Sequence[str]
) -> Probe:
    """Fit on `train_features` `[n, d]`, judge on `test_features` `[m, d]`; the test part chooses nothing.

    Raises:
        ValueError: lengths that don't fit, features that are not finite, a class with fewer than four images in the
            training part, fewer than two classes, or a class that only the test part has.
    """
    x, y = _part(train_features, train_labels)
    seen, truth = _part(test_features, test_labels)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2 or counts.min() < 4:
        raise ValueError(f"probe: {len(classes)} classes, the smallest of {counts.min()} images; needs 2 and 4")
    if unknown := set(truth.tolist()) - set(classes.tolist()):
        raise ValueError(f"probe: only the test part has {sorted(unknown)[:3]}")
    fit, check = train_test_split(np.arange(len(y)), test_size=VALIDATION, stratify=y, random_state=0)
    # On a tie the stronger regularisation, which comes first.
    strength = max(STRENGTHS, key=lambda c: _fitted(c, x[fit], y[fit]).score(x[check], y[check]))
    said = _fitted(strength, x, y).predict(seen)
    return Probe(Rate.over(said == truth), len(y), len(classes), strength)


def halves(names: Sequence[str]) -> NDArray[np.bool_]:
    """`[n]` bool, the training half of a probe: by a hash of the name, so one name is never in both halves.

    No model, seed or order decides it: every model is probed with the same halves.
    """
    return np.array([zlib.crc32(name.strip().lower().encode()) % 2 == 0 for name in names], dtype=bool)


def _fitted(strength: float, x: NDArray[np.float32], y: NDArray[np.str_]) -> LogisticRegression:
    """Stopped after as many steps as the paper's; hardly regularised it would creep on without an end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=MAX_STEPS).fit(x, y)


def _part(features: Tensor, labels: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    x, y = features.detach().float().cpu().numpy(), np.asarray(labels, dtype=str)
    if x.ndim != 2 or y.shape != (len(x),) or not len(x):
        raise ValueError(f"probe: features {x.shape}, labels {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError("probe: features are not finite")
    return x, y
