"""Which claims to believe: the false discovery rate, held under every caption for itself.

A p-value says how often a *wrong* pair would look this good. Believing all p <= alpha lets in a share alpha of the
wrong pairs, and so more of them the more there are: of 460 pairs that argue for one class nine would pass at .02, and a
dozen pairs of a conspicuous trigger suffice. What an attack needs is many pairs under what says one thing. So the share
that is held is that of wrong pairs among those *believed under each caption*:

    believe i  <=>  p_i <= t(c_i),   t(c) = the largest t among the p with  t M(c) <= alpha K(c, t),
    M(c) = sum_j a(c, c_j)^2,   K(c, t) = sum_j a(c, c_j)^2 [p_j <= t].

t M(c) is the number of pairs under c and its like that would come below t were all of them wrong; K(c, t) is the number
that does. With equal captions alone this is the procedure of Benjamini and Hochberg ("Controlling the False Discovery
Rate", 1995) in each caption's own family, as Efron ("Simultaneous inference: when should hypothesis testing problems
be combined?", 2008) advises for families that differ. a is the agreement of captions (`evidence.captions`), squared so
that a family is those who say nearly the same: paraphrases of one claim count as one claim.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def believed(p: Tensor, caption_of: Tensor, agreement: Tensor, alpha: float) -> Tensor:
    """Pairs whose p-value is believed at the false discovery rate `alpha` within their caption's family.

    Args:
        p: `[n]` p-values in 0..1. caption_of: `[n]` int64 into the captions. agreement: `[u, u]` in 0..1.

    Returns:
        `[n]` bool. Who is believed at `alpha` is believed at any larger one.
    """
    weight = agreement.square()
    weight.fill_diagonal_(1.0)  # a caption without a real token agrees with itself all the same
    family = weight @ torch.bincount(caption_of, minlength=len(agreement)).to(weight)
    found = torch.zeros(len(agreement), 1)
    threshold = torch.full((len(agreement),), -1.0)
    order = p.argsort(stable=True)
    for rows in order.split(BLOCK):
        counts = weight[:, caption_of[rows]].cumsum(dim=1) + found
        within = p[rows] * family[:, None] <= alpha * counts
        best = torch.where(within, p[rows], torch.tensor(-1.0)).amax(dim=1)
        threshold = torch.maximum(threshold, best)
        found = counts[:, -1:]
    return p <= threshold[caption_of]
