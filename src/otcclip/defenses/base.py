"""What a defence is: it says which pairs an epoch visits under which captions, and it owns the loss.

`training` drives any `Defense` the same way and never asks which one it has. A defence sees keys, images and captions,
never labels or poison records.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.models.two_tower import TwoTower

Phase = Literal["warm-up", "train"]
Strong = Literal["none", "further", "all"]
KEEP, REPAIR, HOLD_BACK = 0, 1, 2
ACTIONS = ("keep", "re-pair", "hold-back")


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs as a defence sees them; captions are held once each.

    Attributes:
        keys: `n` keys.
        images: `[n, 3, H, W]` uint8.
        captions: `u` distinct captions.
        tokens: `[u, context]` int64.
        caption_of: `[n]` int64, each pair's own caption.
        trusted: `[n]` bool, pairs that somebody vouches for; None where nobody vouches for any. Only a `FineTuner`
            reads it.
    """

    keys: tuple[str, ...]
    images: Tensor | ImageSource
    captions: tuple[str, ...]
    tokens: Tensor
    caption_of: Tensor
    trusted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)


def training_pairs(store: PairStore, model: TwoTower, trusted: Collection[str] | None = None) -> TrainingPairs:
    """Strip a store of everything a defence must not see, and tokenise every distinct caption once.

    Args:
        trusted: keys of pairs that somebody vouches for.

    Raises:
        UserError: a trusted key that no pair has.
    """
    captions, caption_of = np.unique(np.asarray(store.captions, dtype=object), return_inverse=True)
    images = torch.from_numpy(np.ascontiguousarray(store.images)).permute(0, 3, 1, 2)
    return TrainingPairs(
        store.keys,
        images,
        tuple(str(c) for c in captions),
        model.tokenize([str(c) for c in captions]),
        torch.from_numpy(caption_of.astype(np.int64)),
        None if trusted is None else trusted_mask(store.keys, trusted),
    )


def trusted_mask(keys: tuple[str, ...], trusted: Collection[str]) -> Tensor:
    """`[n]` bool, the pairs whose key is among those vouched for.

    Raises:
        UserError: a trusted key that no pair has.
    """
    wanted = set(trusted)
    if stray := sorted(wanted - set(keys)):
        raise UserError(f"trusted keys: {len(stray)} of {len(wanted)} name no training pair, {stray[0]!r} for one")
    return torch.tensor([key in wanted for key in keys], dtype=torch.bool)


@dataclass(frozen=True)
class EpochContext:
    """What a defence may look at before an epoch. `epoch` counts from 0 over warm-up and training together."""

    epoch: int
    epochs: int
    seed: int
    model: TwoTower
    pairs: TrainingPairs


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch visits.

    Attributes:
        phase: `warm-up` (no caption meets an image) or `train`; each has a learning-rate schedule of its own.
        index: `[k]` int64, the pairs to visit; the loop shuffles them.
        caption_of: `[n]` int64, the caption in force for each pair, -1 for an image that learns without one;
            only `index` is read.
        views: augmented views of each image that `step` wants (1 or 2).
        text_views: the same for captions.
        strong: which views are augmented strongly (images as in a warm-up epoch, captions by losing words too): none,
            those beyond the first, or all.
        lr_scale: factor on the learning rate of the schedule.
        apart: `[n]` bool, pairs whose caption and image learn each for itself: `caption_of` names their caption, but
            it isn't in force. None: no such pair.
    """

    phase: Phase
    index: Tensor
    caption_of: Tensor
    views: int = 1
    text_views: int = 1
    strong: Strong = "none"
    lr_scale: float = 1.0
    apart: Tensor | None = None


@dataclass(frozen=True)
class PairBatch:
    """`b` pairs of a step, their captions held once each.

    Attributes:
        index: `[b]` int64 into the training pairs.
        images: `views` tensors `[b, 3, H, W]`, floats in 0..1, augmented.
        tokens: `[u, context]` int64, the batch's distinct captions.
        caption: `[b]` int64 into `tokens`, -1 where no caption is in force.
        token_views: `text_views - 1` further views of `tokens`, row by row.
        apart: `[b]` bool, the plan's `apart` for these pairs.
    """

    index: Tensor
    images: tuple[Tensor, ...]
    tokens: Tensor
    caption: Tensor
    token_views: tuple[Tensor, ...] = ()
    apart: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """A step's loss and its named terms (detached)."""

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """What a defence has decided about every pair, for diagnosis and for the report.

    Attributes:
        action: `[n]` int8: KEEP, REPAIR or HOLD_BACK.
        caption_of: `[n]` int64, the caption in force (meaningless where held back).
        suspicion: `[n]` float64, higher = more suspicious; NaN where the defence does not judge.
    """

    action: NDArray[np.int8]
    caption_of: NDArray[np.int64]
    suspicion: NDArray[np.float64]


class Defense(Protocol):
    """One way to train on pairs that are not trusted (METHOD sections 2 and 4)."""

    name: str
    warmup_epochs: int

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        """Refresh trust and banks, and say what this epoch visits."""
        ...

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        """The loss of one batch, with gradient."""
        ...

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        """The decisions now in force."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors, numbers and strings only."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        ...


class Stateless:
    """What a defence that remembers nothing between steps inherits."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        del state


@runtime_checkable
class FineTuner(Defense, Protocol):
    """A defence that mends a finished model with pairs that somebody vouches for (`TrainingPairs.trusted`).

    The model it is handed before its first epoch is the finished one. It has a budget of its own, so that one set of
    training settings serves it and the run it starts from.

    Attributes:
        starts_from: name of the defence whose finished run it mends.
        epoch_share: its epochs, as a share of those of that run (at least one).
        lr: its peak learning rate.
    """

    starts_from: str
    epoch_share: float
    lr: float


def check_budget(name: str, epoch_share: float, lr: float) -> None:
    """Raise UserError for a `FineTuner`'s budget that is none."""
    if not (0 < epoch_share < math.inf and 0 < lr < math.inf):
        raise UserError(f"{name}: epoch_share and lr are positive, got {epoch_share} and {lr}")


def trusted_index(name: str, pairs: TrainingPairs) -> Tensor:
    """`[m]` int64, the pairs that somebody vouches for.

    Raises:
        UserError: fewer than two; contrast needs two.
    """
    count = 0 if pairs.trusted is None else int(pairs.trusted.sum())
    if pairs.trusted is None or count < 2:
        raise UserError(f"{name}: fine-tunes on pairs that somebody vouches for, and got {count}; it needs two or more")
    return torch.nonzero(pairs.trusted)[:, 0]


def spread(index: Tensor, visits: int) -> Tensor:
    """`visits` visits spread evenly over `index`: an epoch costs what it costs without a defence."""
    rest = index[torch.randperm(len(index))[: visits % len(index)]]
    return torch.cat([index.repeat(visits // len(index)), rest])


def keep_all(pairs: TrainingPairs) -> Decisions:
    """The decisions of a defence that judges nothing."""
    n = len(pairs)
    return Decisions(np.zeros(n, np.int8), pairs.caption_of.numpy(), np.full(n, np.nan))


def matched(pairs: TrainingPairs, caption_of: Tensor | None) -> Decisions:
    """The decisions of a defence that holds nothing back and gives images other captions, `[n]` (None: not yet)."""
    if caption_of is None:
        return keep_all(pairs)
    action = np.where((caption_of != pairs.caption_of).numpy(), REPAIR, KEEP).astype(np.int8)
    return Decisions(action, caption_of.numpy(), np.full(len(pairs), np.nan))


def keep_trusted(pairs: TrainingPairs) -> Decisions:
    """The decisions of a `FineTuner`: only trusted pairs are in force; nothing is judged."""
    n = len(pairs)
    trusted = np.zeros(n, np.bool_) if pairs.trusted is None else pairs.trusted.numpy()
    action = np.where(trusted, KEEP, HOLD_BACK).astype(np.int8)
    return Decisions(action, pairs.caption_of.numpy(), np.full(n, np.nan))
