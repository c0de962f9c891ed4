"""The words that training captions use, as a parameter of their own.

A token embedding has a row for each of 49,408 tokens, a corpus uses some thousands of them, and a dense gradient makes
every step fill, measure, scale and update all: much of a step of the tiny model, and 50 MB of moments that are
zero in every checkpoint. Here the lookup's gradient is sparse and the optimiser sees the rows in use alone.

Rows that no training caption uses stay as they are: they have no gradient, and are not decayed either. So a
pretrained model keeps what it knows of words that it is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from otcclip.models.two_tower import TwoTower


class UsedWords:
    """Stands for a model's token embedding in its optimiser.

    Args:
        tokens: `[u, context]` int64, all that training will look up (and token 0, the padding).
    """

    def __init__(self, model: TwoTower, tokens: Tensor) -> None:
        self._table: nn.Embedding = model.clip.token_embedding
        weight = self._table.weight
        self.rows = torch.unique(torch.cat([tokens.flatten(), tokens.new_zeros(1)])).to(weight.device)
        self.weight = nn.Parameter(weight.detach()[self.rows], requires_grad=weight.requires_grad)

    def among(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """`parameters` with the words in use in place of the whole table."""
        return [self.weight if p is self._table.weight else p for p in parameters]

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within, gradients of lookups are sparse; `collect` brings them to the words in use."""
        before, self._table.sparse = self._table.sparse, True
        self._table.weight.grad = None  # the optimiser does not know it
        try:
            yield
        finally:
            self._table.sparse = before

    def collect(self) -> None:
        """Make the table's gradient that of the words in use, and clear it.

        Raises:
            IndexError: a word was looked up that is not among `tokens`.
        """
        gradient, self._table.weight.grad = self._table.weight.grad, None
        self.weight.grad = None
        if gradient is None:
            return
        gradient = gradient.coalesce()
        index = gradient.indices()[0]
        place = torch.searchsorted(self.rows, index).clamp(max=len(self.rows) - 1)
        if not torch.equal(self.rows[place], index):
            raise IndexError("a word was looked up that no training caption uses")
        self.weight.grad = torch.zeros_like(self.weight).index_copy_(0, place, gradient.values())

    @torch.no_grad()
    def put(self) -> None:
        """Write the words in use into the table: after a step."""
        self._table.weight[self.rows] = self.weight

    @torch.no_grad()
    def take(self) -> None:
        """Read them from the table: after the model was loaded."""
        self.weight.copy_(self._table.weight[self.rows])
