"""Crowds: one picture, shown more often than is usual under claims that are alike, is judged once, from outside.

Copies of a picture that make like claims (`evidence.copies`) are *crowded* where there are more of them than is usual
over the corpus: a quantile over pictures, all copies of one counting as one, so that an enemy moves it by as many
different pictures. Crowded copies do not vote on each other. That is not enough: the luckiest of fifteen is believed by
itself, and who lies on no more siblings than is usual is heard by those who lie on many. One believed copy can be all
that an attack needs. So

* *who belongs to a crowd* is who lies on a crowded picture, whole or by its middle, and says the like of it or shares
  with it a word that says much; and who lies on a quarter of those that do. Not who lies on one of them: drawings of
  the moon hang together from full to new;
* *a crowd has one verdict*: what is heard of its members' captions outside of it, the upper median over the crowd. A
  photograph's copies under another thing's name are borne out by nobody. An honest series (hearts in ten colours,
  families, faces) is drawn alike and named alike, and others say the like of others like it.

A crowd that is borne out has made as many claims as it has members; of one that is not nobody is believed, and its
members have no vote and no model for a witness (`evidence.belief`).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.evidence.copies import ALIKE, FEW, laid, lies_by_its_middle, lies_on, once
from otcclip.evidence.votes import worst_share

USUAL = 0.99  # quantile over pictures of the number of copies that still counts as usual
PART = 0.25  # of those that lie on a picture: who lies on so many is of its crowd; chosen with poison in view (E35)


def crowds(size: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """How often each picture is there, and who is there more often than is usual.

    Args:
        size: number of pictures n. a, b: `[l]` int64, who is whose copy, each pair once.

    Returns:
        `[n]` int64 pictures that show this one, itself included; `[n]` bool, whether they are unusually many.
    """
    shown = torch.bincount(torch.cat([a, b]), minlength=size) + 1
    return shown, shown > usually_shown(shown)


def usually_shown(shown: Tensor) -> int:
    """The most often that a picture is shown and is no crowd, of `shown [n]`, pictures that show each, itself too."""
    ordered = shown.sort().values
    pictures = (1.0 / ordered.double()).cumsum(0)  # a picture shown m times is one picture
    return max(FEW, int(ordered[torch.searchsorted(pictures, USUAL * pictures[-1]).clamp(max=len(shown) - 1)]))


def kin(
    images: Tensor | ImageSource,
    crowded: Tensor,
    alike: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor, Tensor],
    caption_of: Tensor,
    claim: Tensor,
) -> tuple[Tensor, Tensor]:
    """Who else lies on a crowded picture: by its middle, or making its claim in other words.

    Args:
        images: `[n, c, H, W]` uint8. crowded: `[n]` bool. alike: similarity and index, `[n, k]` both, of look-alikes.
        asked: of `copies`, pairs that have been laid over each other whole, and which of them lie.
        caption_of: `[n]` int64. claim: `[u, u]` bool, whose captions make one claim (`words.same_claim`).

    Returns:
        `a, b`, both `[l]` int64, each pair once, `a < b`, and none that `asked` says of that it lies.
    """
    similarity, index = alike
    size, rows = len(crowded), torch.nonzero(crowded)[:, 0]
    row, column = (similarity[rows] >= ALIKE).nonzero(as_tuple=True)
    a, b = once(rows[row], index[rows[row], column], size)
    like = claim[caption_of[a], caption_of[b]]
    a, b = a[like], b[like]
    one, other, lies = asked
    known = torch.isin(a * size + b, one * size + other)
    apart = torch.isin(a * size + b, (one * size + other)[~lies])
    found = torch.zeros(len(a), dtype=torch.bool)
    for lie, pairs in ((lies_on, ~known), (lies_by_its_middle, apart)):
        found[pairs] = laid(lie, images, a[pairs], b[pairs])
    return a[found], b[found]


def members(crowded: Tensor, a: Tensor, b: Tensor) -> sparse.csr_array:
    """Who belongs to whose crowd, `[n, n]` bool, itself included; empty where a picture is in no crowd.

    Args:
        crowded: `[n]` bool. a, b: `[l]` int64, who is whose copy; pairs without a crowded end are left out.
    """
    counts = crowded[a] | crowded[b]
    one, other = torch.cat([a[counts], b[counts]]).numpy(), torch.cat([b[counts], a[counts]]).numpy()
    ties = sparse.coo_array((np.ones(len(one), bool), (one, other)), shape=(len(crowded),) * 2).tocsr()
    return in_part(ties, ties)


def in_part(ties: sparse.csr_array, among: sparse.csr_array) -> sparse.csr_array:
    """`ties`, and who has a tie with `PART` of these and the picture itself: `[n, m]` bool.

    Args:
        ties: `[n, m]` bool, who shows a picture, without itself. among: `[m, m]`, the same of those.
    """
    each = ties.astype(np.float32)
    common = (each @ among.astype(np.float32)).tocoo()
    row, column = common.coords
    enough = common.data >= PART * (1 + np.diff(ties.indptr))[row]
    of_part = sparse.coo_array((np.ones(int(enough.sum()), bool), (row[enough], column[enough])), shape=ties.shape)
    return sparse.csr_array(ties + of_part.tocsr())


def heard_outside(
    crowd: sparse.csr_array, voters: Tensor, weight: Tensor, caption_of: Tensor, agreement: Tensor
) -> Tensor:
    """The verdict on each pair's crowd: what is heard outside of it, the upper median over its members.

    Args:
        crowd: `[n, n]` of `members`. voters, weight: `[v, n, k]` of the evidence. caption_of: `[n]`. agreement:
            `[u, u]`.

    Returns:
        `[n]` in 0..1, a share as `Evidence.own` is; 0 where a picture is in no crowd.
    """
    verdict = torch.zeros(len(caption_of))
    rows = torch.from_numpy(np.flatnonzero(np.diff(crowd.indptr)))
    if not len(rows):
        return verdict

    def outside(row: Tensor, votes: Tensor) -> Tensor:
        of, who = row.numpy().repeat(votes.shape[1]), votes.flatten().numpy()
        return torch.from_numpy(np.asarray(crowd[of.copy(), who.copy()])).view(votes.shape) == 0  # scipy wants its own

    share = torch.zeros(len(caption_of))
    share[rows] = worst_share(outside, rows, voters, weight, caption_of, agreement)
    for row in rows.tolist():
        of_crowd = share[crowd.indices[crowd.indptr[row] : crowd.indptr[row + 1]]]
        verdict[row] = of_crowd.sort().values[len(of_crowd) // 2]
    return verdict
