"""OTCCLIP as it measures best here: evidence first, re-pairing by agreement, transport in matching and loss.

Method after *Pre-training CLIP against Data Poisoning with Optimal Transport-based Matching and Alignment* (arXiv
2509.18717); its constants are not public and none here is the paper's. What differs and why is in docs/method.md.

1. Before the first step, `neighbour_evidence` asks an image's look-alikes whether its caption fits, in the worst of twelve
   views. It is a p-value: keeping pairs with a share <= ALPHA lets in at most an expected share ALPHA of the wrong ones.
2. Training starts on those pairs. Every REFRESH epochs the model, which has never seen the others with their captions,
   ranks each of their captions by d in its own worst view; a pair enters when both witnesses together (Fisher) reach the
   same ALPHA. The share kept is found, not set.
3. An image still outside whose nearest caption is the same in every view, and which its look-alikes' captions support at
   ALPHA too, learns under that caption. A triggered image then teaches its true name *with* the trigger in sight.
4. Loss: CLIP over distinct captions + LAMBDA_OT x contrastive alignment on -OT between patches and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otcclip.defenses.alignment import ot_alignment_loss
from otcclip.defenses.base import (
    HOLD_BACK,
    KEEP,
    REPAIR,
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Step,
    TrainingPairs,
)
from otcclip.defenses.captions import caption_agreement
from otcclip.defenses.encode import WORST_VIEWS, encode_captions, encode_images
from otcclip.defenses.evidence import combined_p, neighbour_evidence, support
from otcclip.defenses.losses import clip_loss, view_loss
from otcclip.defenses.matching import rank_captions
from otcclip.models.two_tower import Features, TwoTower


class OTCClip:
    """`--defense otcclip`.

    Args:
        alpha: expected share of wrong pairs that each decision may let in.
        first_refresh, refresh: the model is asked first after so many training epochs, then every so many.
        repair: whether images held back may learn under a matched caption.
        lambda_ot: weight of the transport alignment loss; 0 leaves it out.
        warmup_epochs: caption-free epochs before training (METHOD section 2.1).
    """

    name = "otcclip"

    def __init__(
        self,
        alpha: float = 0.02,
        confident: float = 0.5,
        unlikely: float = 0.2,
        first_refresh: int = 4,
        refresh: int = 4,
        repair: bool = True,
        grow: bool = True,
        lambda_ot: float = 0.2,
        lambda_view: float = 0.2,
        both_views: bool = False,
        local_share: float = 0.5,
        warmup_epochs: int = 0,
    ) -> None:
        self.alpha, self.first_refresh, self.refresh = alpha, first_refresh, refresh
        self.confident, self.unlikely = confident, unlikely
        self.lambda_view, self.both_views = lambda_view, both_views
        self._warming_up = False
        self.repair, self.grow, self.lambda_ot, self.local_share = repair, grow, lambda_ot, local_share
        self.warmup_epochs = warmup_epochs
        self._own: Tensor | None = None
        self._votes = torch.empty(0)
        self._action = torch.empty(0, dtype=torch.int8)
        self._caption = torch.empty(0, dtype=torch.int64)
        self._suspicion = torch.empty(0)

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        pairs = context.pairs
        if self._own is None:
            evidence = neighbour_evidence(pairs.images, pairs.tokens, pairs.caption_of)
            self._own, self._votes = evidence.own, evidence.votes
            self._suspicion = evidence.own.clone()
            trusted = evidence.own <= self.alpha
            self._action = torch.where(trusted, KEEP, HOLD_BACK).to(torch.int8)
            self._caption = pairs.caption_of.clone()
        self._warming_up = context.epoch < self.warmup_epochs
        if self._warming_up:
            return EpochPlan("warm-up", torch.arange(len(pairs)), pairs.caption_of, views=2)
        trained = context.epoch - self.warmup_epochs
        if trained >= self.first_refresh and (trained - self.first_refresh) % self.refresh == 0:
            self._ask_the_model(context.model, pairs)
        if self.lambda_view > 0:
            held_back = self._action == HOLD_BACK
            caption_of = self._caption.masked_fill(held_back, -1)
            return EpochPlan("train", torch.arange(len(pairs)), caption_of, views=2)
        in_force = torch.nonzero(self._action != HOLD_BACK)[:, 0]
        return EpochPlan("train", _fill(in_force, len(pairs)), self._caption)

    def _ask_the_model(self, model: TwoTower, pairs: TrainingPairs) -> None:
        """Judge every pair that is not in force under its own caption, by a model that never trained on it."""
        assert self._own is not None
        outside = torch.nonzero(self._action != KEEP)[:, 0]
        if not len(outside):
            return
        own = pairs.caption_of[outside]
        text = encode_captions(model, pairs.tokens)
        log_share = torch.zeros(len(outside))
        log_odds = torch.zeros(len(outside), len(text.pooled))
        for view in WORST_VIEWS:
            image = encode_images(model, pairs.images[outside], view)
            log_share += rank_captions(image, text, own, local_share=self.local_share).own_share.log()
            log_odds += torch.log_softmax(model.logit_scale * image.pooled @ text.pooled.T, dim=1)
        # The mean of logs: what is seen in one view of seven, a trigger, counts a seventh.
        share = torch.exp(log_share / len(WORST_VIEWS))
        confidence, best = torch.softmax(log_odds / len(WORST_VIEWS), dim=1).max(dim=1)
        p = combined_p(self._own[outside], share)
        enters = (p <= self.alpha) if self.grow else torch.zeros(len(outside), dtype=torch.bool)
        agreement = torch.from_numpy(caption_agreement(pairs.tokens))
        seconded = (
            support(self._votes[outside], self._caption, self._action != HOLD_BACK, best, agreement) <= self.alpha
        )
        unlikely = p >= self.unlikely
        repaired = unlikely & (confidence >= self.confident) & seconded & self.repair
        self._suspicion[outside] = p.float()
        self._action[outside] = torch.where(enters, KEEP, torch.where(repaired, REPAIR, HOLD_BACK)).to(torch.int8)
        self._caption[outside] = torch.where(repaired, best, own)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        if self._warming_up:
            return _warm_up_step(batch, model)
        image, text = model.image(batch.images[0]), model.text(batch.tokens)
        spoken = torch.nonzero(batch.caption >= 0)[:, 0]
        caption = batch.caption[spoken]
        loss = clip_loss(image.pooled[spoken], text.pooled, caption, model.logit_scale)
        terms = {"clip": loss.detach()}
        if self.lambda_view > 0:
            view = model.image(batch.images[1])
            within = view_loss(image.pooled, view.pooled, temperature=0.1)
            loss = loss + self.lambda_view * within
            terms["views"] = within.detach()
            if self.both_views:
                second = clip_loss(view.pooled[spoken], text.pooled, caption, model.logit_scale)
                loss = loss + second
        if self.lambda_ot > 0:
            spoken_image = Features(image.pooled[spoken], image.local.take(spoken))
            aligned = ot_alignment_loss(spoken_image, text, caption, negatives=7, temperature=0.1)
            loss = loss + self.lambda_ot * aligned
            terms["ot"] = aligned.detach()
        return Step(loss, terms)

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        if self._own is None:
            n = len(pairs)
            return Decisions(np.full(n, HOLD_BACK, np.int8), pairs.caption_of.numpy(), np.full(n, np.nan))
        return Decisions(self._action.numpy(), self._caption.numpy(), self._suspicion.double().numpy())

    def state_dict(self) -> dict[str, Any]:
        if self._own is None:
            return {}
        return {name: getattr(self, f"_{name}") for name in ("own", "votes", "action", "caption", "suspicion")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value)


def _fill(in_force: Tensor, n: int) -> Tensor:
    """`n` visits spread evenly over the pairs in force: an epoch costs what it costs without a defence."""
    if not len(in_force):
        return in_force
    rest = in_force[torch.randperm(len(in_force))[: n % len(in_force)]]
    return torch.cat([in_force.repeat(n // len(in_force)), rest])


def _warm_up_step(batch: PairBatch, model: TwoTower) -> Step:
    """Each modality alone: two views of an image; the captions meet no image."""
    one, two = (model.image(view).pooled for view in batch.images)
    loss = view_loss(one, two, temperature=0.1)
    return Step(loss, {"image views": loss.detach()})
