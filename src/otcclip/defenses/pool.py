"""A first-in-first-out pool of vectors: what RoCLIP matches against and where SafeCLIP looks for neighbours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from otcclip.defenses.base import PairBatch


class Pool:
    """The `size` newest things, oldest first; a thing that comes again takes the place of its older self.

    Columns of one length: `id` `[m]` int64, what a row is, on the CPU; `vector` `[m, d]` unit vectors, and what else is
    pushed, where the model is.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.columns: dict[str, Tensor] = {}

    def push(self, id: Tensor, vector: Tensor, **more: Tensor) -> None:
        """Append rows with distinct ids, without their gradient; the oldest beyond `size` leave."""
        rows = {"id": id, "vector": vector.detach(), **more}
        if self.columns:
            stays = ~torch.isin(self.columns["id"], id)
            rows = {name: torch.cat([self.columns[name][stays], new]) for name, new in rows.items()}
        self.columns = {name: rows_[-self.size :].clone() for name, rows_ in rows.items()}

    @torch.no_grad()
    def nearest(self, query: Tensor) -> Tensor:
        """`[b]` int64 on the CPU, the row with the largest cosine to each of `query [b, d]`."""
        # In bfloat16 near neighbours tie, and the oldest would win.
        with torch.autocast(query.device.type, enabled=False):
            return (query.float() @ self.columns["vector"].float().T).argmax(dim=1).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.columns)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.columns = dict(state)


def pool_size(share: float, pairs: int, things: int) -> int:
    """Rows of a pool of `share` of the pairs, at least 2 and at most all `things` there are."""
    return min(max(2, round(share * pairs)), things)


def caption_ids(batch: PairBatch, caption_of: Tensor) -> Tensor:
    """`[u]` int64, what the rows of `batch.tokens` are, given each pair's caption in the plan."""
    ids, caption = torch.empty(len(batch.tokens), dtype=torch.int64), batch.caption.cpu()
    spoken = caption >= 0
    ids[caption[spoken]] = caption_of[batch.index[spoken]]
    return ids
