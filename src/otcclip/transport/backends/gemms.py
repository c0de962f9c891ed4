"""The GEMMs of a tile on a CPU: scores of sets of x with the vectors of y that they meet, and gradients back.

Scores are made as Sᵀ, tokens by patches, flat, with `LANES` finite floats past the end that the kernels may read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.transport.backends.simd import LANES

Ints = NDArray[np.int64]

# How much longer than its shortest the longest of a batch of GEMMs may be: all are padded to it.
PADDING = 0.5


class Gemms(Protocol):
    """`dtype` is that of the products, None for the operands' own."""

    def scores(self, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Sᵀ of every GEMM, one after another, float32."""
        ...

    def pull(
        self, s: Tensor, x: Tensor, y: Tensor, grads: tuple[Tensor | None, Tensor | None], dtype: torch.dtype | None
    ) -> None:
        """Add S y to the gradient in x and Sᵀ x to that in y; `s` as `scores` laid it out, and used up."""
        ...


@dataclass(frozen=True)
class Each:
    """GEMMs of any size, one call each.

    Attributes:
        parts: (rows of x, rows of y within `y_rows`) of each. y_rows: the stretch of y that the tile needs.
    """

    parts: list[tuple[slice, slice]]
    y_rows: slice

    def scores(self, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
        y = y[self.y_rows]
        s = _room(sum((i.stop - i.start) * (j.stop - j.start) for i, j in self.parts))
        for (x_rows, y_rows), view in zip(self.parts, self._views(s), strict=True):
            if dtype is None:
                torch.mm(y[y_rows], x[x_rows].T, out=view)
            else:
                view.copy_(y[y_rows].to(dtype) @ x[x_rows].to(dtype).T)
        return s

    def pull(
        self, s: Tensor, x: Tensor, y: Tensor, grads: tuple[Tensor | None, Tensor | None], dtype: torch.dtype | None
    ) -> None:
        grad_x, grad_y = grads
        y = y[self.y_rows]
        into_y = None if grad_y is None else torch.empty_like(y)
        for (x_rows, y_rows), pulled in zip(self.parts, self._views(s), strict=True):
            if grad_x is not None:
                grad_x[x_rows] += _product(pulled.T, y[y_rows], dtype)
            if into_y is not None:
                into_y[y_rows] = _product(pulled, x[x_rows], dtype)
        if grad_y is not None and into_y is not None:
            grad_y[self.y_rows] += into_y

    def _views(self, s: Tensor) -> Iterator[Tensor]:
        start = 0
        for x_rows, y_rows in self.parts:
            p, t = x_rows.stop - x_rows.start, y_rows.stop - y_rows.start
            yield s[start : start + p * t].view(t, p)
            start += p * t


@dataclass(frozen=True)
class Together:
    """GEMMs of like size, one call for all: a hundred small calls took four times as long as what they multiplied.

    Attributes:
        x_rows: `[g, p]`, each set's rows of x. y_rows: `[g, t]`, those of y that it meets, a row repeated as padding.
        filler: `[f]` int64, padding's places in `y_rows`, flat.
    """

    x_rows: Tensor
    y_rows: Tensor
    filler: Tensor

    @classmethod
    def of(cls, x_begins: Ints, p: int, y_rows: Ints, lengths: Ints) -> Together:
        """GEMMs of `x[x_begins[k] : x_begins[k] + p]` with the next `lengths[k]` of `y_rows`."""
        longest = int(lengths.max())
        within, ends = np.arange(longest), np.cumsum(lengths)[:, None]
        padded = y_rows[np.minimum(ends - lengths[:, None] + within, ends - 1)]
        filler = np.flatnonzero(within >= lengths[:, None])
        x_rows = x_begins[:, None] + np.arange(p)
        return cls(*(torch.from_numpy(rows) for rows in (x_rows, padded, filler)))

    def scores(self, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> Tensor:
        s = _room(self.x_rows.shape[1] * self.y_rows.numel())
        left, right = _take(y, self.y_rows), _take(x, self.x_rows).transpose(1, 2)
        if dtype is None:
            torch.bmm(left, right, out=self._view(s))
        else:
            self._view(s).copy_(left.to(dtype) @ right.to(dtype))
        return s

    def pull(
        self, s: Tensor, x: Tensor, y: Tensor, grads: tuple[Tensor | None, Tensor | None], dtype: torch.dtype | None
    ) -> None:
        grad_x, grad_y = grads
        pulled = self._view(s)
        pulled.view(-1, pulled.shape[2]).index_fill_(0, self.filler, 0.0)  # which holds scores and pulls at nothing
        if grad_x is not None:
            into_x = _product(pulled.transpose(1, 2), _take(y, self.y_rows), dtype)
            grad_x.index_add_(0, self.x_rows.flatten(), into_x.flatten(0, 1))
        if grad_y is not None:
            grad_y.index_add_(0, self.y_rows.flatten(), _product(pulled, _take(x, self.x_rows), dtype).flatten(0, 1))

    def _view(self, s: Tensor) -> Tensor:
        (g, p), t = self.x_rows.shape, self.y_rows.shape[1]
        return s[: g * t * p].view(g, t, p)


def _room(scores: int) -> Tensor:
    s = torch.empty(scores + LANES)
    s[scores:] = 0
    return s


def _take(vectors: Tensor, rows: Tensor) -> Tensor:
    """`vectors[rows]`, in half the time of that."""
    return vectors.index_select(0, rows.flatten()).view(*rows.shape, vectors.shape[1])


def _product(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    return left @ right if dtype is None else (left.to(dtype) @ right.to(dtype)).to(left.dtype)
