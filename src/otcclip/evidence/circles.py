"""Closed circles: a claim that nearly all look-alikes make, in every view, is put to those who do not make it.
So is a caption that is believed of unusually many pairs.

Where a trigger fills the image, poisoned images are each other's look-alikes in whatever view, and all say the same: a
body of witnesses that is too good. Of honest look-alikes some say something else: in the view where they are fewest, a
fifth of them make a pair's claim in the median, half at the 95th percentile and four fifths at the 99th (believed pairs
of the emoji corpus; docs/experiments.md, E37). So who has more than `CLOSED` of them on his side in *every* view is
heard by the nearest images outside of the circle instead: those with another claim (`words.same_claim`). Who is not
borne out there has no vote either (`evidence.belief`). Series that are drawn alike and named alike (families, bicycles)
stand in such circles too: 1 % of the honest pairs, of which others bear out a sixth; the rest have the model. Where
circles are usual, because a few names stand under very many pictures each, nobody is the worse for being in one: they
must be closer than nineteen of twenty captions' are.

A trigger that makes its pictures alike in most views only is no circle, but of a hundred pairs under one caption dozens
are believed. Who has a caption that stands under unusually many pairs (`trust.unusually_often`) is therefore asked
about outside as well; it counts where unusually many of them are believed (`Belief.trusted`).
"""

from __future__ import annotations

import torch
from scipy import sparse
from torch import Tensor

from otcclip.evidence.trust import usual
from otcclip.evidence.votes import NOBODY, ROWS, SHARPNESS, nearest, own_rank

CLOSED = 0.75  # share of look-alikes; chosen with poison in view (E37)


class Circles:
    """Found view by view: who has been in a closed circle in every view so far, and what is heard outside of it.

    Args:
        silent: `[n, n]` bool, who has no vote on whom. caption_of: `[n]` int64. claim: `[u, u]` bool, which captions
            make the same claim (`words.same_claim`). agreement: `[u, u]`. asked: `[n]` bool, who is asked about outside
            in any case.
    """

    def __init__(
        self, silent: sparse.csr_array, caption_of: Tensor, claim: Tensor, agreement: Tensor, asked: Tensor
    ) -> None:
        self._silent, self._caption_of, self._claim, self._agreement = silent, caption_of, claim, agreement
        self._asked = asked
        self._mates = torch.ones(len(caption_of))
        self._rows = torch.arange(len(caption_of))
        self._heard = torch.zeros(len(caption_of))

    def look(self, vectors: Tensor, votes: Tensor, voice: Tensor) -> None:
        """One more view.

        Args:
            vectors: `[n, d]` of the images. votes: `[n, k]` int64, look-alikes. voice: `[n]`, what a vote weighs beside
                its nearness.
        """
        mates = self._claim[self._caption_of[:, None], self._caption_of[votes]].float().mean(dim=1)
        self._mates = torch.minimum(self._mates, mates)
        stays = ((self._mates > CLOSED) | self._asked)[self._rows]
        self._rows, heard = self._rows[stays], self._heard[stays]
        parts = [self._outside(rows, vectors, votes.shape[1], voice) for rows in self._rows.split(ROWS)]
        self._heard = torch.maximum(heard, torch.cat(parts)) if parts else heard

    def inside(self) -> Tensor:
        """`[n]` bool, who is in a closed circle."""
        count = torch.bincount(self._caption_of)
        of_caption = torch.bincount(self._caption_of, self._mates) / count
        return self._mates > usual(of_caption, count).clamp(min=CLOSED)

    def outside(self) -> Tensor:
        """`[n]` share of captions that those outside like at least as well as the pair's own, in the worst view; 0 for
        who is not asked about, 1 where in some view nobody is outside."""
        out = torch.zeros(len(self._caption_of))
        out[self._rows] = self._heard
        return out.masked_fill(~(self.inside() | self._asked), 0.0)

    def _outside(self, rows: Tensor, vectors: Tensor, k: int, voice: Tensor) -> Tensor:
        own = self._caption_of[rows]
        similarity = (vectors[rows] @ vectors.T).masked_fill_(self._claim[own][:, self._caption_of], NOBODY)
        row, image = (torch.from_numpy(part) for part in self._silent[rows.numpy()].nonzero())
        closeness, index = nearest(similarity, row, image, k)
        there = closeness > NOBODY
        weight = torch.softmax(closeness / SHARPNESS, dim=1) * voice[index] * there
        share = own_rank(weight, self._caption_of[index], own, self._agreement)
        return torch.where(there.any(dim=1), share, 1.0)
