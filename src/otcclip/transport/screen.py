"""The pool sets that are solved first: those of highest pooled cosine, so that the bounds have a value to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from otcclip.transport.tiers import Search


def screened(search: Search, pooled_queries: Tensor | None, pooled_pool: Tensor | None, width: int) -> Tensor:
    """The `width` pool sets of highest pooled cosine for each query, `[n, width]`."""
    n, device = len(search.queries), search.value.device
    score = torch.full((n, 0), -torch.inf, device=device)
    index = torch.empty(n, 0, dtype=torch.int64, device=device)
    for start, stop in search.stretches():
        if pooled_queries is not None and pooled_pool is not None:
            fresh = pooled_queries.float() @ pooled_pool[start:stop].float().T
        else:
            some = search.summarised(start, stop)
            fresh = search.means.direction.to(some.direction.dtype) @ some.direction.T
            search.peaks[start] = fresh.amax(1).float()
        score, index = _merge(score, index, fresh, start, width)
    return index


def _merge(score: Tensor, index: Tensor, fresh: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """The `width` best of what was kept and a fresh stretch `[n, s]`; after the first few stretches nearly none."""
    if score.shape[1] < width:
        position = torch.arange(start, start + fresh.shape[1], device=fresh.device).expand(len(fresh), -1)
        score, index = torch.cat([score, fresh.float()], 1), torch.cat([index, position], 1)
    else:
        hit = (fresh.amax(1).float() > score[:, -1]).nonzero()[:, 0]
        row, column = (fresh[hit].float() > score[hit, -1:]).nonzero(as_tuple=True)
        if not len(row):
            return score, index
        row = hit[row]
        count = torch.bincount(row, minlength=len(fresh))
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        extra = score.new_full((len(fresh), int(count.max())), -torch.inf)
        where = index.new_zeros(extra.shape)
        score = torch.cat([score, extra.index_put((row, place), fresh[row, column].float())], 1)
        index = torch.cat([index, where.index_put((row, place), column + start)], 1)
    score, order = score.topk(min(width, score.shape[1]), dim=1)
    return score, index.gather(1, order)
