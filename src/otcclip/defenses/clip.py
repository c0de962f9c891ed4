"""Undefended CLIP: every pair as it stands. The yardstick that every attack and every defence is held against.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
"""

from __future__ import annotations

import torch

from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Stateless,
    Step,
    TrainingPairs,
    keep_all,
)
from otcclip.defenses.losses import clip_loss, smoothed
from otcclip.errors import UserError
from otcclip.models.two_tower import TwoTower


class Clip(Stateless):
    """Contrastive training on all pairs with their own captions.

    Args:
        smoothing: part of every target that goes to all captions of the batch alike, as `otcclip` has it; 0 is CLIP.

    Raises:
        UserError: a part out of range.
    """

    name = "clip"
    warmup_epochs = 0

    def __init__(self, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing <= 1:
            raise UserError(f"clip: smoothing is in 0..1, got {smoothing}")
        self.smoothing = smoothing

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        return EpochPlan("train", torch.arange(len(context.pairs)), context.pairs.caption_of)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, text = model.image(batch.images[0]), model.text(batch.tokens)
        target = None
        if self.smoothing > 0:
            target = smoothed(torch.eye(len(batch.tokens), device=batch.tokens.device), self.smoothing)
        loss = clip_loss(image.pooled, text.pooled, batch.caption, model.logit_scale, target)
        return Step(loss, {"clip": loss.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_all(pairs)
