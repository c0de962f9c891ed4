"""The batches of an epoch: which pairs, in which order, as what a step sees of them.

Order and augmentation are drawn from one generator seeded by (seed, epoch), one batch after another. A place in an
epoch is therefore the number of steps done and the generator's state there; no worker, buffer or queue holds anything
that a restart could lose. Every rank draws for the whole batch and fetches its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.data.images import fetch
from otcclip.defenses.base import EpochPlan, PairBatch, TrainingPairs
from otcclip.errors import UserError
from otcclip.training.augment import Augmentation, crop_captions, drop_words
from otcclip.training.distributed import World
from otcclip.training.towers import Share


@dataclass(frozen=True)
class Views:
    """How images and captions are varied: see `TrainConfig`."""

    augment: Augmentation
    warmup_augment: Augmentation
    caption_crop: float
    word_drop: float


class EpochBatches:
    """Batches of one epoch; a last short batch is dropped, as in open_clip.

    Args:
        seed: of this epoch.
        batch_size: pairs in a batch, over all ranks.
        spread: whether images come as a `Share` (a step then sees a `SpreadTower`).

    Attributes:
        size: pairs of a step, over all ranks. count: steps.
    """

    def __init__(
        self,
        pairs: TrainingPairs,
        plan: EpochPlan,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        world: World,
        spread: bool,
    ) -> None:
        self.pairs, self.plan, self.views, self.world, self.spread = pairs, plan, views, world, spread
        self.generator = torch.Generator().manual_seed(seed)
        self._order = plan.index[torch.randperm(len(plan.index), generator=self.generator)]
        self.size = min(batch_size, len(self._order)) // world.size * world.size
        if len(self._order) and not self.size:
            raise UserError(f"{len(self._order)} pairs to visit, fewer than the {world.size} processes")
        self.count = len(self._order) // self.size if self.size else 0

    def start(self, step: int) -> Iterator[PairBatch]:
        """The batches from number `step` on; `generator` is to be in the state it had there."""
        indices = [self._order[i * self.size : (i + 1) * self.size] for i in range(step, self.count)]
        mine = self.world.share(self.size)
        for index, raw in zip(indices, fetch(self.pairs.images, [index[mine] for index in indices]), strict=True):
            yield self._batch(index, raw)

    def _batch(self, index: Tensor, raw: Tensor) -> PairBatch:
        device = self.world.device
        raw = raw.to(device, non_blocking=True)
        images = tuple(self._image_view(raw, view) for view in range(self.plan.views))
        unique, caption = torch.unique(self.plan.caption_of[index], return_inverse=True)
        if len(unique) and unique[0] < 0:
            unique, caption = unique[1:], caption - 1
        texts = tuple(self._caption_view(unique, view).to(device) for view in range(self.plan.text_views))
        apart = None if self.plan.apart is None else self.plan.apart[index]
        return PairBatch(index, images, texts[0], caption.to(device), texts[1:], apart)

    def _image_view(self, raw: Tensor, view: int) -> Tensor:
        strong = self.plan.phase == "warm-up" or _is_strong(self.plan, view)
        augment = self.views.warmup_augment if strong else self.views.augment
        lots = augment.draw(self.size, self.generator)
        mine = self.world.share(self.size)
        x = augment.apply(raw, {name: lot[mine].to(raw.device) for name, lot in lots.items()})
        # A defence passes images on to its model and picks rows of them, which a Share takes like a tensor.
        return Share.of(x, self.size, self.world) if self.spread else x  # type: ignore[return-value]

    def _caption_view(self, captions: Tensor, view: int) -> Tensor:
        tokens = crop_captions(self.pairs.tokens[captions], self.views.caption_crop, self.generator)
        return drop_words(tokens, self.views.word_drop, self.generator) if _is_strong(self.plan, view) else tokens


def _is_strong(plan: EpochPlan, view: int) -> bool:
    return plan.strong == "all" or (plan.strong == "further" and view > 0)
