"""Duplicate captions: how often the very caption occurs in the reference.

log(1 + count), self excluded. Poison argues by repetition: a backdoor needs dozens of pairs under few captions.
Honest captions repeat too (alt text, one thing drawn by many hands), so this tells where to look and convicts nobody.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import numpy as np

from otcclip.detectors.base import PairFeatures, Scores


class DuplicateCaptions:
    """log(1 + pairs of the reference with this caption, white space and case folded, self excluded)."""

    name: ClassVar[str] = "duplicate-captions"
    comparable: ClassVar[bool] = False  # counts grow with the reference
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        counts = Counter(_folded(caption) for caption in features.against.captions)
        seen = np.array([counts[_folded(caption)] for caption in features.captions], np.float64)
        out: Scores = np.log1p(seen - (features.self_index.numpy() >= 0))
        return out


def _folded(caption: str) -> str:
    return " ".join(caption.casefold().split())
