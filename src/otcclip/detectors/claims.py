"""Who makes the same claim as a pair, and so is no witness for it: the rules of `evidence.neighbours` against a fixed
reference.

Near-duplicates of an image (to the encoder, or by their looks) do not vote on it, and neither do the other altered
copies of a picture where they are a *crowd* (`evidence.copies`): more than is usual in the reference. A claim is made
as often as there are near-duplicates under its very caption, or members of the crowd. Each pair is asked about by
itself, so that what is found does not depend on the pairs that stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from otcclip.detectors.agreement import CaptionAgreement
from otcclip.detectors.base import ROWS, PairFeatures
from otcclip.detectors.views import encoder_views, picture_views
from otcclip.evidence.copies import ALIKE, CANDIDATES, FEW, LIKE, laid_over, small, spectra, usually_shown
from otcclip.evidence.neighbours import NEAR_DUPLICATE


@dataclass(frozen=True)
class Claims:
    """Of `n` pairs against a reference of `m`.

    Attributes:
        made: `[n]` int64, how often each pair's claim is made, by itself too.
        crowded: `[n]` bool, pairs whose image is shown more often than is usual.
        silent: `[n, m]` bool, who has no vote on a pair: itself, near-duplicates by their looks, the rest of its crowd.
        silent_to_encoder: `[n, m]` bool, the same and near-duplicates to the encoder.
        crowd: `[n, m]` bool, the rest of its crowd.
    """

    made: Tensor
    crowded: Tensor
    silent: sparse.csr_array
    silent_to_encoder: sparse.csr_array
    crowd: sparse.csr_array


def claims(features: PairFeatures) -> Claims:
    """Find them (computed once)."""

    def make() -> Claims:
        if (known := features.known(claims, _take)) is not None:
            return known
        against = features.against
        found = _shown(features)
        usual = usually_shown((found if against is features else _shown(against)).shown)
        crowded = found.shown > usual
        there = crowded if against is features else claims(against).crowded
        among = crowded[found.row] & there[found.mate]
        shape = (len(features), len(against))
        crowd = _table(found.row[among], found.mate[among], shape)
        silent = (found.twins + crowd).tocsr()
        made = torch.where(crowded, found.shown, found.same)
        return Claims(made, crowded, silent, (silent + found.twins_to_encoder).tocsr(), crowd)

    return features.once("claims", make)


def _take(found: Claims, rows: Tensor) -> Claims:
    at = rows.numpy()
    tables = (found.silent, found.silent_to_encoder, found.crowd)
    return Claims(found.made[rows], found.crowded[rows], *(table[at] for table in tables))


@dataclass(frozen=True)
class _Shown:
    """How often each pair's picture and its claim are there, `[n]` int64; `[n, m]`, itself and duplicates by looks,
    and those to the encoder; `row`, `mate` `[l]`, who else in the reference shows a pair's picture with a like claim.
    """

    shown: Tensor
    same: Tensor
    twins: sparse.csr_array
    twins_to_encoder: sparse.csr_array
    row: Tensor
    mate: Tensor


def _shown(features: PairFeatures) -> _Shown:
    def make() -> _Shown:
        parts = [_of_rows(features, slice(a, a + ROWS)) for a in range(0, len(features), ROWS)]
        twins, to_encoder = (
            sparse.vstack([getattr(part, name) for part in parts], format="csr")
            for name in ("twins", "twins_to_encoder")
        )
        shown, same, row, mate = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("shown", "same", "row", "mate")
        )
        return _Shown(shown, same, twins, to_encoder, row, mate)

    return features.once("shown", make)


def _of_rows(features: PairFeatures, rows: slice) -> _Shown:
    """`_Shown` of some pairs; their mates' `row` counts from the first of all."""
    against = features.against
    place, own = torch.arange(len(features))[rows], features.self_index[rows]
    inside = torch.nonzero(own >= 0)[:, 0]
    itself = torch.zeros(len(place), len(against), dtype=torch.bool)
    itself[inside, own[inside]] = True
    to_encoder = (encoder_views(features)[0][rows] @ encoder_views(against)[0].T) > NEAR_DUPLICATE
    twins, row, mate = itself, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    if features.pictures is not None:
        alike = picture_views(features)[0][rows] @ picture_views(against)[0].T
        twins = (alike > NEAR_DUPLICATE) | itself
        row, mate = (twins & ~itself).nonzero(as_tuple=True)
        like = _like(features, place[row], mate)
        copy_row, copy = _copies(features, rows, alike.masked_fill_(twins, -2.0))
        row, mate = torch.cat([row[like], copy_row]), torch.cat([mate[like], copy])
    shown = torch.bincount(row, minlength=len(place)) + 1
    same = _same_claim(features, rows, twins | to_encoder)
    # As tables at once: a thousand placeholders are a million twins, and lists of them take eight times the memory.
    looks, encoder = sparse.csr_array(twins.numpy()), sparse.csr_array(to_encoder.numpy())
    return _Shown(shown, same, looks, encoder, place[row], mate)


def _same_claim(features: PairFeatures, rows: slice, twins: Tensor) -> Tensor:
    """`[r]` how many of some pairs' `twins [r, m]` carry their very captions, they themselves included."""
    row, image = twins.nonzero(as_tuple=True)
    kind, own = torch.from_numpy(features.against.kinds[1]), features.self_index[rows]
    found = torch.bincount(row[kind[image] == features.kind_there[rows][row]], minlength=len(own))
    # Who is in the reference is his own twin there; where his caption was changed since, he still counts himself.
    return torch.where(own < 0, found + 1, found.clamp_min(1))


def _copies(features: PairFeatures, rows: slice, alike: Tensor) -> tuple[Tensor, Tensor]:
    """Altered copies `(row within rows, image)` among the look-alikes `alike [r, m]` with like claims."""
    against = features.against
    assert features.pictures is not None
    similarity, index = alike.topk(min(CANDIDATES, alike.shape[1]), dim=1)
    # In float, as training compares: in bfloat16 the threshold itself would be rounded.
    row, column = (similarity.float() >= ALIKE).nonzero(as_tuple=True)
    image = index[row, column]
    like = _like(features, torch.arange(len(features))[rows][row], image)
    row, image = row[like], image[like]
    enough = torch.bincount(row, minlength=len(alike))[row] >= FEW
    row, image = row[enough], image[enough]
    if not len(row):
        return row, image
    here, moving = row.unique(return_inverse=True)
    found = laid_over(_spectra(against), small(features.pictures[rows][here]), image, moving)
    return row[found], image[found]


def _spectra(reference: PairFeatures) -> Tensor:
    """13 KB a pair, once: most of the reference's pictures are somebody's look-alike."""

    def make() -> Tensor:
        assert reference.pictures is not None
        return torch.cat([spectra(small(part)) for part in reference.pictures.split(ROWS)])

    return reference.once("spectra", make)


def _like(features: PairFeatures, rows: Tensor, images: Tensor) -> Tensor:
    """`[l]` bool: whether the pairs `rows` make claims like those of the reference's `images`."""
    mine, theirs = features.words, features.against.words
    return torch.from_numpy(CaptionAgreement.paired(mine, rows.numpy(), theirs, images.numpy())) >= LIKE


def _table(row: Tensor, column: Tensor, shape: tuple[int, int]) -> sparse.csr_array:
    entries = np.ones(len(row), bool)
    return sparse.csr_array((entries, (row.numpy(), column.numpy())), shape=shape, dtype=bool)
