"""What a step sees as its model when its batch is spread over ranks, or too large to be encoded at once.

A defence computes its loss from features, and asks a `TwoTower` for them. `SpreadTower` answers in that model's place:

* `image(Share)` encodes the rows that this rank holds and gathers everybody's, so that the loss has all negatives;
* `text(tokens)` encodes this rank's part of captions that every rank knows, and gathers;
* with `chunks` > 1 both run without gradient a chunk at a time; after the loss's backward pass has said what it asks of
  each feature, `replay` encodes each chunk once more, with gradient, and passes that on (Gao, Zhang, Han and Callan,
  Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021: GradCache). The contrastive batch stays
  whole and memory is a chunk's. Batch normalisation sees a chunk.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from otcclip.models.two_tower import Features, TwoTower
from otcclip.training.distributed import World, gather, gather_counts
from otcclip.transport import FeatureSets


class Share:
    """A batch of samples of which this rank holds its own; indexed by numbers in the whole batch, as a tensor would be.

    Attributes:
        local: `[m, ...]`, the rows that this rank holds, in the batch's order.
        owner: `[n]` int64, the rank that holds each row of the batch.
    """

    def __init__(self, local: Tensor, owner: Tensor, rank: int) -> None:
        self.local, self.owner, self.rank = local, owner, rank

    @classmethod
    def of(cls, local: Tensor, n: int, world: World) -> Share:
        """The rows `world.share(n)` of a batch of `n`."""
        return cls(local, torch.repeat_interleave(torch.arange(world.size), torch.tensor(world.counts(n))), world.rank)

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: Tensor) -> Share:
        """The rows at `index` (int64 numbers or a bool mask) of the whole batch, as a batch of its own."""
        rows = torch.arange(len(self))[index.cpu()]
        mine = self.owner[rows] == self.rank
        place = torch.cumsum(self.owner == self.rank, 0) - 1
        return Share(self.local[place[rows[mine]].to(self.local.device)], self.owner[rows], self.rank)


class _GlobalFeatures:
    """`Features` of the whole batch; local sets, the larger part, travel only when a defence asks for them."""

    def __init__(self, mine: Features, order: Tensor | None, counts: list[int], world: World) -> None:
        self._mine, self._order, self._world = mine, order, world
        self._counts = counts
        pooled = gather(mine.pooled, counts)
        self.pooled = pooled if order is None else pooled[order.to(pooled.device)]

    @cached_property
    def local(self) -> FeatureSets:
        mine = self._mine.local
        sizes = gather(mine.sizes.to(self._world.device)[:, None], self._counts)[:, 0].cpu()
        values = gather(mine.values, gather_counts(len(mine.values), self._world))
        sets = FeatureSets(values, torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]))
        return sets if self._order is None else sets.take(self._order)


@dataclass
class _Cached:
    """One call of a tower: its chunks, and the features that the loss will send gradients to."""

    encode: Callable[[Tensor], Features]
    chunks: tuple[Tensor, ...]
    random: list[Tensor]
    pooled: Tensor
    values: Tensor
    sets: list[int]  # vectors in each chunk's local sets


class SpreadTower:
    """Stands for `model` in a step and before an epoch; whatever it does not know itself it asks the model."""

    def __init__(self, model: TwoTower, world: World, chunks: int = 1) -> None:
        self.model, self.world, self.chunks = model, world, chunks
        self._calls: list[_Cached] = []

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpreadTower:
        return SpreadTower(copy.deepcopy(self.model, memo), self.world, self.chunks)

    def train(self, mode: bool = True) -> SpreadTower:
        self.model.train(mode)
        return self

    def eval(self) -> SpreadTower:
        return self.train(False)

    def requires_grad_(self, wanted: bool = True) -> SpreadTower:
        self.model.requires_grad_(wanted)
        return self

    def image(self, images: Tensor | Share) -> Features:
        """Features of the whole batch. A plain tensor is one that every rank holds whole."""
        if isinstance(images, Share):
            counts = torch.bincount(images.owner, minlength=self.world.size).tolist()
            first = torch.argsort(images.owner, stable=True)
            order = None if bool((first.diff() > 0).all()) else torch.argsort(first)
            return self._gathered(self._encode(self.model.image, images.local), order, counts)
        return self._replicated(self.model.image, images)

    def text(self, tokens: Tensor) -> Features:
        return self._replicated(self.model.text, tokens)

    def _replicated(self, encode: Callable[[Tensor], Features], x: Tensor) -> Features:
        if len(x) < self.world.size:  # nothing to share out: every rank encodes all, and gradients are averaged
            return self._encode(encode, x)
        mine = self._encode(encode, x[self.world.share(len(x))])
        return self._gathered(mine, None, self.world.counts(len(x)))

    def _gathered(self, mine: Features, order: Tensor | None, counts: list[int]) -> Features:
        if self.world.size == 1:
            return mine
        return _GlobalFeatures(mine, order, counts, self.world)  # type: ignore[return-value]

    def _encode(self, encode: Callable[[Tensor], Features], x: Tensor) -> Features:
        # Batch norms of the image tower meet at every pass: all ranks make as many, one with few rows some empty ones.
        meets = self.world.size > 1 and encode == self.model.image
        if self.chunks == 1 or not torch.is_grad_enabled() or (len(x) < self.chunks and not meets):
            return encode(x)
        chunks = x.tensor_split(self.chunks)
        parts, random = [], []
        with torch.no_grad(), _statistics_kept(self.model):
            for chunk in chunks:
                random.append(torch.get_rng_state())
                parts.append(encode(chunk))
        local = FeatureSets.concatenate([part.local for part in parts])
        pooled = torch.cat([part.pooled for part in parts]).requires_grad_()
        values = local.values.requires_grad_()
        sets = [len(part.local.values) for part in parts]
        self._calls.append(_Cached(encode, chunks, random, pooled, values, sets))
        return Features(pooled, FeatureSets(values, local.offsets))

    def replay(self) -> None:
        """After the loss's backward pass: pass on to the parameters what it asked of the cached features."""
        calls, self._calls = self._calls, []
        for call in calls:
            pooled = _asked(call.pooled).split([len(chunk) for chunk in call.chunks])
            values = _asked(call.values).split(call.sets)
            for chunk, random, wanted, wanted_values in zip(call.chunks, call.random, pooled, values, strict=True):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(random)
                    part = call.encode(chunk)
                torch.autograd.backward([part.pooled, part.local.values], [wanted, wanted_values])


def _asked(features: Tensor) -> Tensor:
    return torch.zeros_like(features) if features.grad is None else features.grad


@contextlib.contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Leave running statistics alone: each chunk is encoded twice and is to count once."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
