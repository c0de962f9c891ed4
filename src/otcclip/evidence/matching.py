"""The distance between an image and a caption, and what follows from ranking captions by it.

d(i, c) = (1 - a)(1 - g_i . g_c) + a OT_eps(V_i, T_c)                                             (METHOD section 1)

with pooled vectors g, patches V and tokens T. Ranking a whole pool by d would solve every transport problem; a screen
by the pooled term finds the candidates (recall of the exact argmin at 128 is 1.0, TRANSPORT section 3) and the
transport term ranks those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.models.two_tower import Features
from otcclip.transport import pair_costs

LOCAL_SHARE = 0.5
EPSILON = 0.1
ITERATIONS = 10
SCREEN = 32
ROWS = 1024


@dataclass(frozen=True)
class Ranking:
    """Captions of a pool ranked for `n` images by d.

    Attributes:
        best: `[n]` int64, the nearest caption.
        distance: `[n]`, its d.
        margin: `[n]`, d of the next one minus that.
        own_distance: `[n]`, d of the image's own caption.
        own_share: `[n]` in (0, 1], share of the pool at least as near as the own caption.
    """

    best: Tensor
    distance: Tensor
    margin: Tensor
    own_distance: Tensor
    own_share: Tensor


def rank_captions(
    image: Features, text: Features, own: Tensor, *, local_share: float = LOCAL_SHARE, screen: int = SCREEN
) -> Ranking:
    """Rank the pool `text` (u captions) for every image; `own [n]` is each image's own caption in the pool."""
    parts = []
    for start in range(0, len(own), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(own)))
        part = Features(image.pooled[rows], image.local.take(rows))
        parts.append(_rank(part, text, own[rows], local_share, screen))
    return Ranking(*(torch.cat([getattr(p, name) for p in parts]) for name in Ranking.__dataclass_fields__))


def own_share(
    image: Features, text: Features, own: Tensor, *, local_share: float = LOCAL_SHARE, screen: int = SCREEN
) -> Tensor:
    """`Ranking.own_share` alone, `[n]`: where the own caption is not in the screen, nothing has to be transported."""
    parts = zip(image.pooled.split(ROWS), own.split(ROWS), strict=True)
    nearer = torch.cat([_nearer(pooled @ text.pooled.T, mine) for pooled, mine in parts])
    share = (nearer + 0.5) / len(text.pooled)
    rows = torch.nonzero(nearer < screen)[:, 0]
    if len(rows):
        seen = Features(image.pooled[rows], image.local.take(rows))
        share[rows] = rank_captions(seen, text, own[rows], local_share=local_share, screen=screen).own_share
    return share


def _nearer(cosine: Tensor, own: Tensor) -> Tensor:
    """How many captions are nearer than the own one by the pooled term, `cosine [n, u]`."""
    return (cosine > cosine.gather(1, own[:, None])).sum(dim=1)


def candidate_costs(image: Features, text: Features, columns: Tensor) -> Tensor:
    """OT_eps of each image to its own candidates: `columns [n, c]` into `text` -> `[n, c]`, with gradient."""
    rows = torch.arange(len(columns), device=columns.device).repeat_interleave(columns.shape[1])
    pairs = (rows, columns.flatten())  # by index: a set that serves several pairs is read once
    costs = pair_costs(image.local, text.local, pairs=pairs, epsilon=EPSILON, iterations=ITERATIONS, validate=False)
    return costs.value.view_as(columns)


def _rank(image: Features, text: Features, own: Tensor, local_share: float, screen: int) -> Ranking:
    u = len(text.pooled)
    cosine = image.pooled @ text.pooled.T
    candidates = cosine.topk(min(screen, u), dim=1).indices
    columns = torch.cat([candidates, own[:, None]], dim=1)
    d = 1 - cosine.gather(1, columns)
    if local_share > 0:
        d = (1 - local_share) * d + local_share * candidate_costs(image, text, columns)
    own_d, d = d[:, -1], d[:, :-1]
    top = d.topk(min(2, d.shape[1]), dim=1, largest=False)
    best = candidates.gather(1, top.indices[:, :1])[:, 0]
    margin = top.values[:, -1] - top.values[:, 0]
    # Inside the screen d decides; a caption outside it keeps its place by the pooled term.
    inside = (candidates == own[:, None]).any(dim=1)
    nearer = torch.where(inside, (d < own_d[:, None]).sum(dim=1), _nearer(cosine, own))
    return Ranking(best, top.values[:, 0], margin, own_d, (nearer + 0.5) / u)
