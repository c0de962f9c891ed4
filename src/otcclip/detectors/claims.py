"""Who makes the same claim as a pair, and so is no witness for it: the rules of `evidence.neighbours` against a fixed
reference.

Near-duplicates of an image (to the encoder, or by their looks) do not vote on it, and neither do the other altered
copies of a picture where they are a *crowd* (`evidence.copies`): more than is usual in the reference. A claim is made as
often as there are near-duplicates under its very caption, or members of the crowd. Each pair is asked about by itself,
so that what is found does not depend on the pairs that stand beside it.
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
from otcclip.evidence.copies import ALIKE, CANDIDATES, FEW, LIKE, laid_over, small, usually_shown
from otcclip.evidence.neighbours import NEAR_DUPLICATE


@dataclass(frozen=True)
class Claims:
    """Of `n` pairs against a reference of `m`.

    Attributes:
        made: `[n]` int64, how often each pair's claim is made, by itself too.
        crowded: `[n]` bool, pairs whose image is shown more often than is usual.
        silent: `[n, m]` bool, who has no vote on a pair: itself, near-duplicates, the rest of its crowd.
        crowd: `[n, m]` bool, the rest of its crowd.
    """

    made: Tensor
    crowded: Tensor
    silent: sparse.csr_array
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
        return Claims(torch.where(crowded, found.shown, found.same), crowded, (found.twins + crowd).tocsr(), crowd)

    return features.once("claims", make)


def _take(found: Claims, rows: Tensor) -> Claims:
    at = rows.numpy()
    return Claims(found.made[rows], found.crowded[rows], found.silent[at], found.crowd[at])


@dataclass(frozen=True)
class _Shown:
    """How often each pair's picture and its claim are there (`[n]` int64); `twins [n, m]`: itself and near-duplicates;
    `row`, `mate` `[l]`: other pairs of the reference that show a pair's picture and make a like claim."""

    shown: Tensor
    same: Tensor
    twins: sparse.csr_array
    row: Tensor
    mate: Tensor


def _shown(features: PairFeatures) -> _Shown:
    def make() -> _Shown:
        parts = [_of_rows(features, slice(a, a + ROWS)) for a in range(0, len(features), ROWS)]
        row, twin, mate_row, mate = (torch.cat(part) for part in zip(*parts, strict=True))
        n, own = len(features), features.self_index
        stranger = (own < 0).long()  # who is in the reference is his own twin there
        same = features.against.kinds[1][twin.numpy()] == features.kind_there[row].numpy()
        made = torch.bincount(row[torch.from_numpy(same)], minlength=n) + stranger
        shown = torch.bincount(mate_row, minlength=n) + 1
        return _Shown(shown, made.clamp_min(1), _table(row, twin, (n, len(features.against))), mate_row, mate)

    return features.once("shown", make)


def _of_rows(features: PairFeatures, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some pairs: themselves and near-duplicates `(row, image)`, then who shows the same and claims the like."""
    against = features.against
    place = torch.arange(len(features))[rows]
    own = features.self_index[rows]
    twins = (encoder_views(features)[0][rows] @ encoder_views(against)[0].T) > NEAR_DUPLICATE
    alike = None
    if features.pictures is not None:
        alike = (picture_views(features)[0][rows] @ picture_views(against)[0].T).float()
        twins |= alike > NEAR_DUPLICATE
    inside = torch.nonzero(own >= 0)[:, 0]
    twins[inside, own[inside]] = True
    row, twin = twins.nonzero(as_tuple=True)
    if alike is None:
        nobody = torch.empty(0, dtype=torch.int64)
        return place[row], twin, nobody, nobody
    like = _like(features, place[row], twin) & (twin != own[row])
    copy_row, copy = _copies(features, rows, alike.masked_fill_(twins, -2.0))
    return place[row], twin, place[torch.cat([row[like], copy_row])], torch.cat([twin[like], copy])


def _copies(features: PairFeatures, rows: slice, alike: Tensor) -> tuple[Tensor, Tensor]:
    """Altered copies `(row within rows, image)` among the look-alikes `alike [r, m]` with like claims."""
    against = features.against
    assert features.pictures is not None and against.pictures is not None
    similarity, index = alike.topk(min(CANDIDATES, alike.shape[1]), dim=1)
    row, column = (similarity >= ALIKE).nonzero(as_tuple=True)
    image = index[row, column]
    like = _like(features, torch.arange(len(features))[rows][row], image)
    row, image = row[like], image[like]
    enough = torch.bincount(row, minlength=len(alike))[row] >= FEW
    row, image = row[enough], image[enough]
    if not len(row):
        return row, image
    there, still = image.unique(return_inverse=True)
    here, moving = row.unique(return_inverse=True)
    found = laid_over(small(against.pictures[there]), small(features.pictures[rows][here]), still, moving)
    return row[found], image[found]


def _like(features: PairFeatures, rows: Tensor, images: Tensor) -> Tensor:
    """`[l]` bool: whether the pairs `rows` make claims like those of the reference's `images`."""
    mine, theirs = word_marginals(features), word_marginals(features.against)
    return torch.from_numpy(CaptionAgreement.paired(mine[rows.numpy()], theirs[images.numpy()])) >= LIKE


def word_marginals(features: PairFeatures) -> sparse.csr_array:
    """`[n, v]` the captions' words, weighed as in the reference (computed once)."""
    return features.once("words", lambda: features.agreement.marginals(features.captions))


def _table(row: Tensor, column: Tensor, shape: tuple[int, int]) -> sparse.csr_array:
    entries = np.ones(len(row), bool)
    return sparse.csr_array((entries, (row.numpy(), column.numpy())), shape=shape, dtype=bool)
