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


Pairs = tuple[Tensor, Tensor]  # rows of the pairs asked about, and of the reference


def _joined(parts: tuple[Pairs, ...]) -> Pairs:
    rows, images = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(images)


def _shown(features: PairFeatures) -> _Shown:
    def make() -> _Shown:
        parts = [_of_rows(features, slice(a, a + ROWS)) for a in range(0, len(features), ROWS)]
        looks, encoder, mates = (_joined(pairs) for pairs in zip(*parts, strict=True))
        n, shape = len(features), (len(features), len(features.against))
        twins, to_encoder = _table(*looks, shape), _table(*encoder, shape)
        # Who is in the reference is his own twin there.
        made = _same_claim(features, (twins + to_encoder).tocoo()) + (features.self_index < 0).long()
        return _Shown(torch.bincount(mates[0], minlength=n) + 1, made, twins, to_encoder, *mates)

    return features.once("shown", make)


def _same_claim(features: PairFeatures, twins: sparse.coo_array) -> Tensor:
    """`[n]` how many of a pair's twins carry its very caption; a pair whose caption was changed since counts itself."""
    same = features.against.kinds[1][twins.col] == features.kind_there.numpy()[twins.row]
    found = np.bincount(twins.row[same], minlength=len(features))
    return torch.from_numpy(found).clamp_min((features.self_index >= 0).long())


def _of_rows(features: PairFeatures, rows: slice) -> tuple[Pairs, Pairs, Pairs]:
    """Of some pairs: themselves and near-duplicates by looks; near-duplicates to the encoder; mates (`_Shown`)."""
    against = features.against
    place, own = torch.arange(len(features))[rows], features.self_index[rows]
    inside = torch.nonzero(own >= 0)[:, 0]
    itself = place[inside], own[inside]
    twins = (encoder_views(features)[0][rows] @ encoder_views(against)[0].T) > NEAR_DUPLICATE
    row, image = twins.nonzero(as_tuple=True)
    to_encoder = place[row], image
    if features.pictures is None:
        nobody = torch.empty(0, dtype=torch.int64)
        return itself, to_encoder, (nobody, nobody)
    alike = picture_views(features)[0][rows] @ picture_views(against)[0].T
    twins = alike > NEAR_DUPLICATE
    twins[inside, own[inside]] = True
    row, image = twins.nonzero(as_tuple=True)
    like = _like(features, place[row], image) & (image != own[row])
    copy_row, copy = _copies(features, rows, alike.masked_fill_(twins, -2.0))
    mates = place[torch.cat([row[like], copy_row])], torch.cat([image[like], copy])
    return (place[row], image), to_encoder, mates


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
