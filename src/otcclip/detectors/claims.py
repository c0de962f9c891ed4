"""Who makes the same claim as a pair, and so is no witness for it: the rules of `evidence.neighbours` against a fixed
reference.

Near-duplicates of an image (to the encoder, or by their looks) do not vote on it, and neither does the rest of a
*crowd* (`evidence.crowds`): altered copies of a picture, more than is usual in the reference, and who belongs to them.
A claim is made as often as there are near-duplicates under its very caption, or copies in the crowd. Each pair is asked
about by itself, so that what is found does not depend on the pairs that stand beside it.
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
from otcclip.evidence.captions import LIKE
from otcclip.evidence.copies import ALIKE, CANDIDATES, FEW, laid_over, lies_on, small, spectra
from otcclip.evidence.crowds import in_part, usually_shown
from otcclip.evidence.neighbours import NEAR_DUPLICATE
from otcclip.evidence.words import SAYS_MUCH


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
        found, (crowded, ties) = _shown(features), _ties(features)
        crowd = _without(in_part(ties, _ties(features.against)[1]), features.self_index)
        silent = (found.twins + crowd).tocsr()
        made = torch.where(crowded, found.shown, found.same)
        return Claims(made, crowded, silent, (silent + found.twins_to_encoder).tocsr(), crowd)

    return features.once("claims", make)


def _take(found: Claims, rows: Tensor) -> Claims:
    at = rows.numpy()
    tables = (found.silent, found.silent_to_encoder, found.crowd)
    return Claims(found.made[rows], found.crowded[rows], *(table[at] for table in tables))


def _ties(features: PairFeatures) -> tuple[Tensor, sparse.csr_array]:
    """`[n]` bool, whose picture is shown unusually often; `[n, m]` bool, who shows a pair's picture with its claim
    where one of the two is crowded (computed once)."""

    def make() -> tuple[Tensor, sparse.csr_array]:
        against, found = features.against, _shown(features)
        crowded = found.shown > usually_shown((found if against is features else _shown(against)).shown)
        there = crowded if against is features else _ties(against)[0]
        kin = _kin(features, crowded, there)
        row, mate = torch.cat([found.row, kin[0]]), torch.cat([found.mate, kin[1]])
        counts = crowded[row] | there[mate]
        return crowded, _table(row[counts], mate[counts], (len(features), len(against)))

    return features.once("ties", make)


def _kin(features: PairFeatures, crowded: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """`evidence.crowds.kin` of pairs and images of the reference, by who is crowded here and there."""
    found = _shown(features)
    maybe = torch.nonzero(crowded[found.maybe_row] | there[found.maybe_mate])[:, 0]
    row, mate = found.maybe_row[maybe], found.maybe_mate[maybe]
    if not len(row):
        return row, mate
    against = features.against
    assert features.pictures is not None and against.pictures is not None
    mates, still = mate.unique(return_inverse=True)
    rows, moving = row.unique(return_inverse=True)
    pictures = torch.cat([small(against.pictures[mates]), small(features.pictures[rows])])
    lying = lies_on(pictures, still, len(mates) + moving)
    return row[lying], mate[lying]


@dataclass(frozen=True)
class _Shown:
    """How often each pair's picture and its claim are there, `[n]` int64; `[n, m]`, itself and duplicates by looks,
    and those to the encoder; `row`, `mate` `[l]`, who else in the reference shows a pair's picture with its claim;
    `maybe_row`, `maybe_mate` `[q]`, look-alikes that make its claim and were not found to, as far as was looked.
    """

    shown: Tensor
    same: Tensor
    twins: sparse.csr_array
    twins_to_encoder: sparse.csr_array
    row: Tensor
    mate: Tensor
    maybe_row: Tensor
    maybe_mate: Tensor


def _shown(features: PairFeatures) -> _Shown:
    def make() -> _Shown:
        parts = [_of_rows(features, slice(a, a + ROWS)) for a in range(0, len(features), ROWS)]
        twins, to_encoder = (
            sparse.vstack([getattr(part, name) for part in parts], format="csr")
            for name in ("twins", "twins_to_encoder")
        )
        shown, same, *rest = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("shown", "same", "row", "mate", "maybe_row", "maybe_mate")
        )
        return _Shown(shown, same, twins, to_encoder, *rest)

    return features.once("shown", make)


def _of_rows(features: PairFeatures, rows: slice) -> _Shown:
    """`_Shown` of some pairs; their mates' `row` counts from the first of all."""
    against = features.against
    place, own = torch.arange(len(features))[rows], features.self_index[rows]
    inside = torch.nonzero(own >= 0)[:, 0]
    itself = torch.zeros(len(place), len(against), dtype=torch.bool)
    itself[inside, own[inside]] = True
    to_encoder = (encoder_views(features)[0][rows] @ encoder_views(against)[0].T) > NEAR_DUPLICATE
    twins = itself
    row, mate, maybe_row, maybe_mate = (torch.empty(0, dtype=torch.int64) for _ in range(4))
    shown = torch.ones(len(place), dtype=torch.int64)
    if features.pictures is not None:
        alike = picture_views(features)[0][rows] @ picture_views(against)[0].T
        twins = (alike > NEAR_DUPLICATE) | itself
        twin_row, twin = (twins & ~itself).nonzero(as_tuple=True)
        like = _like(features, place[twin_row], twin)
        (copy_row, copy), (maybe_row, maybe_mate) = _copies(features, rows, alike.masked_fill_(twins, -2.0))
        shown += torch.bincount(torch.cat([twin_row[like], copy_row]), minlength=len(place))
        # Who only shares a word makes nobody crowded, but belongs to who is.
        claim = like | _share_a_word(features, place[twin_row], twin)
        row, mate = torch.cat([twin_row[claim], copy_row]), torch.cat([twin[claim], copy])
    same = _same_claim(features, rows, twins | to_encoder)
    # As tables at once: a thousand placeholders are a million twins, and lists of them take eight times the memory.
    looks, encoder = sparse.csr_array(twins.numpy()), sparse.csr_array(to_encoder.numpy())
    return _Shown(shown, same, looks, encoder, place[row], mate, place[maybe_row], maybe_mate)


def _same_claim(features: PairFeatures, rows: slice, twins: Tensor) -> Tensor:
    """`[r]` how many of some pairs' `twins [r, m]` carry their very captions, they themselves included."""
    row, image = twins.nonzero(as_tuple=True)
    kind, own = torch.from_numpy(features.against.kinds[1]), features.self_index[rows]
    found = torch.bincount(row[kind[image] == features.kind_there[rows][row]], minlength=len(own))
    # Who is in the reference is his own twin there; where his caption was changed since, he still counts himself.
    return torch.where(own < 0, found + 1, found.clamp_min(1))


def _copies(features: PairFeatures, rows: slice, alike: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Altered copies `(row within rows, image)` among the look-alikes `alike [r, m]` with like claims; and others of
    these, and who shares a word."""
    against = features.against
    assert features.pictures is not None
    similarity, index = alike.topk(min(CANDIDATES, alike.shape[1]), dim=1)
    # In float, as training compares: in bfloat16 the threshold itself would be rounded.
    row, column = (similarity.float() >= ALIKE).nonzero(as_tuple=True)
    image, place = index[row, column], torch.arange(len(features))[rows]
    like = _like(features, place[row], image)
    enough = like & (torch.bincount(row[like], minlength=len(alike))[row] >= FEW)
    found = torch.zeros_like(like)
    if enough.any():
        here, moving = row[enough].unique(return_inverse=True)
        found[enough] = laid_over(_spectra(against), small(features.pictures[rows][here]), image[enough], moving)
    other = ~found & (like | _share_a_word(features, place[row], image))
    return (row[found], image[found]), (row[other], image[other])


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


def _share_a_word(features: PairFeatures, rows: Tensor, images: Tensor) -> Tensor:
    """`[l]` bool: whether a word says much both in the captions of the pairs `rows` and of the reference's `images`."""
    mine, theirs = features.words, features.against.words
    return torch.from_numpy(CaptionAgreement.loudest(mine, rows.numpy(), theirs, images.numpy())) >= SAYS_MUCH


def _without(table: sparse.csr_array, column: Tensor) -> sparse.csr_array:
    """`table [n, m]` without one entry a row, at `column [n]` (-1: none)."""
    out = table.tocoo()
    stays = out.col != column.numpy()[out.row]
    return _table(torch.from_numpy(out.row[stays]), torch.from_numpy(out.col[stays]), table.shape)


def _table(row: Tensor, column: Tensor, shape: tuple[int, int]) -> sparse.csr_array:
    entries = np.ones(len(row), bool)
    return sparse.csr_array((entries, (row.numpy(), column.numpy())), shape=shape, dtype=bool)
