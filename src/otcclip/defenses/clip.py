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
from otcclip.defenses.losses import clip_loss
from otcclip.models.two_tower import TwoTower


class Clip(Stateless):
    """Contrastive training on all pairs with their own captions."""

    name = "clip"
    warmup_epochs = 0

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        return EpochPlan("train", torch.arange(len(context.pairs)), context.pairs.caption_of)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, text = model.image(batch.images[0]), model.text(batch.tokens)
        loss = clip_loss(image.pooled, text.pooled, batch.caption, model.logit_scale)
        return Step(loss, {"clip": loss.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_all(pairs)
