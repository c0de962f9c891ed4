"""Conflicting captions: the same image elsewhere under a caption that says something else.

Score: the largest disagreement 1 - agreement (OT between words, `agreement.py`) with the captions of duplicates in
the reference; 0 without a duplicate. Duplicates are equal files (sha256) or perceptual hashes that differ in at most
2 of 64 bits: a recompressed or resized copy differs by so little, another photograph by about 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from otcclip.detectors.base import PairFeatures, Scores

BITS = 2
AT_A_TIME = 128


class ConflictingCaptions:
    """Disagreement with the captions of duplicate images, self excluded."""

    name: ClassVar[str] = "conflicting-captions"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, features: PairFeatures) -> Scores:
        """See `Detector.score`."""
        against = features.against
        theirs = against.agreement.marginals(against.kinds[0])
        out = np.zeros(len(features))
        for row, twin in duplicates(features):
            kind = against.kinds[1][twin]
            agreed = against.agreement.paired(features.words, row, theirs, kind).astype(np.float64)
            # Word weights may be zero (a word in every caption): equal captions agree, whatever their weights.
            same = features.kind_there.numpy()[row] == kind
            np.maximum.at(out, row, np.where(same, 0.0, 1 - agreed))
        return out


def duplicates(features: PairFeatures) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of these pairs and of the reference that show the same image, self left out; some of these pairs at a time,
    since a placeholder that stands in for thousands of lost images makes millions of such rows."""
    against, own = features.against, features.self_index.numpy()
    number = {digest: i for i, digest in enumerate(dict.fromkeys(against.sha256))}
    theirs = np.array([number[digest] for digest in against.sha256])
    mine = np.array([number.get(digest, -1) for digest in features.sha256])
    for start in range(0, len(features), AT_A_TIME):
        part = slice(start, start + AT_A_TIME)
        same = np.bitwise_count(features.phash[part, None] ^ against.phash[None]) <= BITS
        same |= mine[part, None] == theirs[None]
        row, twin = np.nonzero(same)
        other = twin != own[part][row]
        yield row[other] + start, twin[other]
