"""Ragged batches of unit vectors: `FeatureSets`, the one input type of the transport room.

`n` sets (an image's patches, a caption's tokens) lie packed, one after another, so nothing is stored or
multiplied for padding. `offsets` stay on the host whatever the device of `values`, because planning tiles is
host work and a read-back from an accelerator would stall it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# bfloat16 keeps 8 bits: normalising in it and rounding the result moves a norm by up to 2^-8 = 0.0039.
UNIT_TOLERANCE = 1e-2
# How far a set's weights may sum from 1: the rounding of bfloat16 weights.
MASS_TOLERANCE = 1e-2
# Vectors that are read at a time where all are: a pool may be larger than memory.
_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class FeatureSets:
    """`n` non-empty sets of vectors in R^d, packed.

    Attributes:
        values: `[total, d]` floating point, all vectors of set 0, then of set 1, …; may carry a gradient.
        offsets: `[n + 1]` int64 on the CPU; set i is `values[offsets[i]:offsets[i + 1]]`.
        weights: `[total]` on the device of `values`, each vector's share of its set's mass, not negative and
            summing to 1 in every set; None, the default, for equal shares. Carries no gradient.

    Raises:
        ValueError: a shape or dtype is wrong, offsets do not rise from 0 to `total`, or a set is empty.
            Whether the vectors are finite and of unit norm, and the weights shares, costs a pass over them
            and is checked by `validate`.
    """

    values: Float[Tensor, "total d"]
    offsets: Int64[Tensor, " n_plus_1"]
    weights: Float[Tensor, " total"] | None = None

    def __post_init__(self) -> None:
        values, offsets = self.values, self.offsets
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"values: expected [total, d] floating point, got {_describe(values)}")
        if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) < 1:
            raise ValueError(f"offsets: expected [n + 1] int64, got {_describe(offsets)}")
        if offsets.device.type != "cpu":
            offsets = offsets.cpu()
            object.__setattr__(self, "offsets", offsets)
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(values):
            ends = f"{int(offsets[0])} to {int(offsets[-1])}"
            raise ValueError(f"offsets: expected to run from 0 to total = {len(values)}, got {ends}")
        steps = offsets.diff()
        if bool((steps < 0).any()):
            at = int((steps < 0).nonzero()[0])
            raise ValueError(f"offsets: not monotone, got {int(offsets[at])} then {int(offsets[at + 1])} at {at}")
        if bool((steps == 0).any()):
            raise ValueError(f"offsets: set {int((steps == 0).nonzero()[0])} is empty; every set needs a vector")
        weights = self.weights
        if weights is not None and (weights.shape != values.shape[:1] or not weights.is_floating_point()):
            raise ValueError(f"weights: expected [{len(values)}] floating point, got {_describe(weights)}")

    @classmethod
    def from_list(cls, sets: Sequence[Float[Tensor, "_ d"]]) -> FeatureSets:
        """Pack a list of `[n_i, d]` tensors."""
        if not sets:
            raise ValueError("sets: expected at least one [n_i, d] tensor, got an empty list")
        dims = sorted({tuple(part.shape[1:]) for part in sets})
        if len(dims) != 1 or len(dims[0]) != 1:
            raise ValueError(f"sets: expected [n_i, d] tensors of one d, got trailing shapes {dims}")
        sizes = torch.tensor([len(part) for part in sets])
        return cls(torch.cat(list(sets)), _offsets_of(sizes))

    @classmethod
    def from_dense(cls, values: Float[Tensor, "n m d"]) -> FeatureSets:
        """Pack `n` sets of equal size `m`; a view, no copy, where `values` is contiguous."""
        if values.ndim != 3:
            raise ValueError(f"values: expected [n, m, d], got {_describe(values)}")
        n, m, d = values.shape
        return cls(values.reshape(n * m, d), torch.arange(n + 1) * m)

    @classmethod
    def from_padded(cls, values: Float[Tensor, "n m d"], mask: Bool[Tensor, "n m"]) -> FeatureSets:
        """Pack the vectors where `mask` is True; what stands in the padding is never read."""
        if values.ndim != 3:
            raise ValueError(f"values: expected [n, m, d], got {_describe(values)}")
        if mask.dtype != torch.bool or mask.shape != values.shape[:2]:
            raise ValueError(f"mask: expected {list(values.shape[:2])} bool, got {_describe(mask)}")
        return cls(values[mask], _offsets_of(mask.sum(1).cpu()))

    @classmethod
    def concatenate(cls, parts: Sequence[FeatureSets]) -> FeatureSets:
        """The sets of every part, one part after another."""
        if not parts:
            raise ValueError("parts: expected at least one FeatureSets, got an empty list")
        dims = sorted({part.dim for part in parts})
        if len(dims) != 1:
            raise ValueError(f"parts: expected one dim, got {dims}")
        sizes = torch.cat([part.sizes for part in parts])
        weighted = any(part.weights is not None for part in parts)
        weights = torch.cat([part.shares() for part in parts]) if weighted else None
        return cls(torch.cat([part.values for part in parts]), _offsets_of(sizes), weights)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Int64[Tensor, " n"]:
        """How many vectors each set holds (host)."""
        return self.offsets.diff()

    @property
    def dim(self) -> int:
        return int(self.values.shape[1])

    def __getitem__(self, index: int) -> Float[Tensor, "_ d"]:
        """The vectors of one set, `[n_i, d]`, a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: {index} is out of range for {len(self)} sets")
        index %= len(self)
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def rows(self, index: Int64[Tensor, " k"]) -> tuple[Int64[Tensor, "k m"], Bool[Tensor, "k m"]]:
        """Where the vectors of the sets at `index` lie in `values`, padded to the largest; and which are
        real.

        A padded place points at its set's own first vector: read it at weight zero and nothing (a row
        minimum, a finite sum) needs a special case for padding.
        """
        sizes = self.sizes[index]
        within = torch.arange(int(sizes.max()) if len(sizes) else 0)
        mask = within < sizes[:, None]
        return self.offsets[index][:, None] + within * mask, mask

    def take(self, index: Any) -> FeatureSets:
        """The sets at `index`, in that order: integers in any array form, or a bool mask `[n]`."""
        idx = torch.as_tensor(index).cpu()
        idx = idx.nonzero()[:, 0] if idx.dtype == torch.bool else idx.to(torch.int64)
        if idx.ndim != 1 or bool(((idx < -len(self)) | (idx >= len(self))).any()):
            raise ValueError(f"index: expected integers in [-{len(self)}, {len(self)}), got {idx.tolist()[:8]}")
        idx = idx % max(len(self), 1)
        rows, mask = self.rows(idx)
        packed = rows[mask].to(self.values.device)
        weights = None if self.weights is None else self.weights[packed]
        return FeatureSets(self.values[packed], _offsets_of(self.sizes[idx]), weights)

    def stretch(self, start: int, stop: int) -> FeatureSets:
        """The sets from `start` to `stop`, a view: no copy, whatever the size."""
        low, high = int(self.offsets[start]), int(self.offsets[stop])
        weights = None if self.weights is None else self.weights[low:high]
        return FeatureSets(self.values[low:high], self.offsets[start : stop + 1] - low, weights)

    def padded(self) -> tuple[Float[Tensor, "n m d"], Bool[Tensor, "n m"]]:
        """`values [n, m, d]` with zeros in the padding, and `mask [n, m]`, True where a vector is real."""
        rows, mask = self.rows(torch.arange(len(self)))
        mask = mask.to(self.values.device)
        return self.values[rows.to(mask.device)] * mask[..., None], mask

    def pooled(self) -> Float[Tensor, "n d"]:
        """The mean of each set, normalised: a stand-in where a tower's own pooled vector is not at hand."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.sizes).to(self.values.device)
        total = self.values.new_zeros(len(self), self.dim).index_add(0, owner, self.values)
        return torch.nn.functional.normalize(total, dim=1)

    def weighted(self, weights: Float[Tensor, " total"]) -> FeatureSets:
        """The same sets with other shares of their mass, packed as `values` are."""
        return FeatureSets(self.values, self.offsets, weights)

    def shares(self, dtype: torch.dtype | None = None) -> Float[Tensor, " total"]:
        """`weights` to sum exactly to 1, or the equal shares that None stands for; device of `values`, and its dtype
        unless another is asked for."""
        sizes = self.sizes
        if self.weights is None:
            shares = torch.repeat_interleave(1 / sizes.double(), sizes)
        else:
            weights = self.weights.detach().cpu().double()
            shares = weights / torch.repeat_interleave(self._masses(weights), sizes)
        return shares.to(self.values.device, dtype or self.values.dtype)

    def _masses(self, weights: Tensor) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(self)), self.sizes)
        return torch.zeros(len(self), dtype=weights.dtype).index_add(0, owner, weights)

    def to(self, *args: Any, **kwargs: Any) -> FeatureSets:
        """`values.to(...)`: another device or dtype, weights with them. `offsets` stay on the host."""
        weights = None if self.weights is None else self.weights.to(*args, **kwargs)
        return FeatureSets(self.values.to(*args, **kwargs), self.offsets, weights)

    def detach(self) -> FeatureSets:
        """The same sets, cut from the graph."""
        return FeatureSets(self.values.detach(), self.offsets, self.weights)

    def validate(self, name: str = "values") -> FeatureSets:
        """Raise ValueError, naming `name`, unless all is finite and of unit norm (to `UNIT_TOLERANCE`)."""
        if not len(self):
            raise ValueError(f"{name}: expected at least one set, got none")
        with torch.no_grad():
            found = [self._worst_norm(start) for start in range(0, len(self.values), _CHUNK)]
        off, row_at, norm = max(found)
        # A NaN or inf anywhere makes its norm one, so a single pass serves both messages.
        row = f"vector {row_at} (set {int(torch.searchsorted(self.offsets, row_at, right=True)) - 1})"
        if off == torch.inf:
            raise ValueError(f"{name}: {row} holds NaN or inf")
        if off > UNIT_TOLERANCE:
            raise ValueError(f"{name}: expected unit vectors, {row} has norm {norm:.4g}; normalise the features")
        self._validate_weights(name)
        return self

    def _worst_norm(self, start: int) -> tuple[float, int, float]:
        """How far the norm furthest from 1 is from it, where, and the norm, of a stretch of vectors."""
        norms = torch.linalg.vector_norm(self.values[start : start + _CHUNK].float(), dim=1)
        off = (norms - 1).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        at = int(off.argmax())
        return float(off[at]), start + at, float(norms[at])

    def _validate_weights(self, name: str) -> None:
        if self.weights is None:
            return
        weights = self.weights.detach().cpu().double()
        if bool((bad := ~(weights >= 0)).any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"{name}: expected weights >= 0, got {float(weights[at]):.4g} for vector {at}")
        mass = self._masses(weights)
        worst = int((mass - 1).abs().argmax())
        if not abs(float(mass[worst]) - 1) <= MASS_TOLERANCE:
            found = f"those of set {worst} sum to {float(mass[worst]):.4g}"
            raise ValueError(f"{name}: expected weights that sum to 1, {found}")


def _offsets_of(sizes: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), sizes.to(torch.int64).cumsum(0)])


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
