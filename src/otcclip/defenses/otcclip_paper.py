"""OTCCLIP read plainly: every K-th epoch, every image learns under its nearest caption.

*Pre-training CLIP against Data Poisoning with Optimal Transport-based Matching and Alignment* (arXiv 2509.18717):
captions are re-assigned to images by the distance of METHOD section 1 (global and fine-grained features together), and
OT-based losses align patches with tokens and views with each other. The paper's constants are not public; those here
are ours.

It trusts the model's own matches from the first matched epoch. docs/experiments.md says what that leads to on a small
corpus; it stands beside `otcclip` so that anyone can see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from otcclip.defenses.alignment import ot_alignment_loss
from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Step,
    TrainingPairs,
    matched,
)
from otcclip.defenses.losses import clip_loss, view_loss
from otcclip.errors import UserError
from otcclip.evidence.matching import rank_captions
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.two_tower import TwoTower


class OTCClipPaper:
    """`--defense otcclip-paper`.

    Args:
        every: K; epochs `K - 1, 2K - 1, ...` train on the matches, the others on the pairs as they stand.
        pool: captions in the matching pool, as a share of the distinct ones; drawn anew for each matching.
        lambda_cross, lambda_view: weights of the alignment losses across and within a modality.
    """

    name = "otcclip-paper"
    warmup_epochs = 0

    def __init__(self, every: int = 2, pool: float = 1.0, lambda_cross: float = 0.2, lambda_view: float = 0.2) -> None:
        if every < 1 or not 0 < pool <= 1 or not all(0 <= x < math.inf for x in (lambda_cross, lambda_view)):
            raise UserError(
                f"otcclip-paper: every={every}, pool={pool}, lambda_cross={lambda_cross}, lambda_view={lambda_view}: "
                "every is 1 or more, pool a share in (0, 1], weights 0 or more"
            )
        self.every, self.pool = every, pool
        self.lambda_cross, self.lambda_view = lambda_cross, lambda_view
        self._matched: Tensor | None = None

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        pairs = context.pairs
        everything = torch.arange(len(pairs))
        self._matched = None
        if context.epoch % self.every == self.every - 1:
            self._matched = self._match(context.model, pairs)
        caption_of = pairs.caption_of if self._matched is None else self._matched
        return EpochPlan("train", everything, caption_of, views=2)

    def _match(self, model: TwoTower, pairs: TrainingPairs) -> Tensor:
        """Every image's nearest caption of the pool by d."""
        size = max(2, round(self.pool * len(pairs.tokens)))
        pool = torch.randperm(len(pairs.tokens))[:size].sort().values
        text = encode_captions(model, pairs.tokens[pool])
        image = encode_images(model, pairs.images)
        # A caption outside the pool has no rank in it; only the nearest one is read.
        stand_in = torch.zeros(len(pairs), dtype=torch.int64)
        return pool[rank_captions(image, text, stand_in).best]

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, text = model.image(batch.images[0]), model.text(batch.tokens)
        loss = clip_loss(image.pooled, text.pooled, batch.caption, model.logit_scale)
        cross = ot_alignment_loss(image, text, batch.caption, negatives=7, temperature=0.1)
        view = model.image(batch.images[1])
        within = view_loss(image.pooled, view.pooled, temperature=0.1)
        own = torch.arange(len(batch.index))
        within = (within + ot_alignment_loss(image, view, own, negatives=7, temperature=0.1)) / 2
        total = loss + self.lambda_cross * cross + self.lambda_view * within
        return Step(total, {"clip": loss.detach(), "ot": cross.detach(), "views": within.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return matched(pairs, self._matched)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._matched is None else {"matched": self._matched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._matched = state.get("matched")
