"""Conflicting captions: the same image elsewhere under a caption that says something else.

Score: the largest disagreement 1 - agreement (OT between words, `agreement.py`) with the captions of duplicates in
the reference; 0 without a duplicate. Duplicates are equal files (sha256) or perceptual hashes that differ in at most
2 of 64 bits: a recompressed or resized copy differs by so little, another photograph by about 32.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from otcclip.detectors.base import ROWS, PairFeatures, Scores

BITS = 2


class ConflictingCaptions:
    """Disagreement with the captions of duplicate images, self excluded."""

    name: ClassVar[str] = "conflicting-captions"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        against = features.against
        row, twin = duplicates(features)
        out = np.zeros(len(features))
        if len(row):
            words = against.agreement
            theirs, kind = words.marginals(against.kinds[0]), against.kinds[1][twin]
            agreed = words.paired(features.words, row, theirs, kind).astype(np.float64)
            # Word weights may be zero (a word in every caption): equal captions agree, whatever their weights.
            same = np.array([features.captions[i] == against.captions[j] for i, j in zip(row, twin, strict=True)])
            np.maximum.at(out, row, np.where(same, 0.0, 1 - agreed))
        return out


def duplicates(features: PairFeatures) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of these pairs and of the reference that show the same image, self left out."""
    against, own = features.against, features.self_index.numpy()
    digests: dict[str, list[int]] = {}
    for j, digest in enumerate(against.sha256):
        digests.setdefault(digest, []).append(j)
    found = {(i, j) for i, digest in enumerate(features.sha256) for j in digests.get(digest, ()) if j != own[i]}
    for start in range(0, len(features), ROWS):
        differ = np.bitwise_count(features.phash[start : start + ROWS, None] ^ against.phash[None])
        rows, twins = np.nonzero(differ <= BITS)
        found |= {(i + start, j) for i, j in zip(rows.tolist(), twins.tolist(), strict=True) if j != own[i + start]}
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
