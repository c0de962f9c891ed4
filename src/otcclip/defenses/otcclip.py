"""OTCCLIP as it measures best here: evidence first, then a model that judges only what it never saw.

After *Pre-training CLIP against Data Poisoning with Optimal Transport-based Matching and Alignment* (arXiv
2509.18717). The paper's constants are not public and none here is the paper's. docs/method.md is the one-page account,
docs/decisions.md says where it departs from the paper and from METHOD section 2.

1. Before the first step, `evidence.neighbours` asks an image's look-alikes whether its caption fits, in the worst of
   thirteen views, and how often one drawn by lot would: a p-value. Those are believed that leave an expected share of
   ALPHA wrong pairs under every caption (`believed`: a claim made by many is not let in by a few lucky ones), but none
   by a word that most use without having seen it (`doubtful`), no more by one that no look-alike uses than is usual
   (`rarely_unheard`), and no more under one claim than is usual (`in_measure`).
2. Training starts on those. At every refresh the model, which never saw the other pairs with their captions, ranks each
   of those captions by d; a pair enters when both witnesses together (Fisher) are believed. It is no
   witness to a crowd of copies that nobody outside bears out (`evidence.crowds`): if it trained on one of them, it has
   seen the others too. Nor to a claim under which it suddenly speaks for more than is usual (`usually_vouched`): such a
   claim is closed, and its pairs in force are judged again without the votes of those for whom only the model speaks.
3. An image still outside whose own caption looks random learns under its nearest caption, if it is as near as pairs in
   force usually are and the image's look-alikes second it. A triggered image then teaches its true name with the
   trigger in sight.
4. Loss: CLIP over distinct captions, where what says nearly the same is nearly right (agreement, in shares, in place of
   a single right answer) and a part of every target goes to all alike (label smoothing, Szegedy et al., "Rethinking the
   Inception Architecture", 2016, section 7) + LAMBDA_OT x contrastive alignment on -OT between patches and tokens
   (+ LAMBDA_VIEW x view agreement, in which images held back take part; off by default, it did not pay).
"""

from __future__ import annotations

import math
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
    spread,
)
from otcclip.defenses.losses import clip_loss, smoothed, view_loss
from otcclip.defenses.pool import caption_ids
from otcclip.errors import UserError
from otcclip.evidence.belief import Belief
from otcclip.evidence.matching import own_share
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.fold import folded
from otcclip.models.two_tower import Features, TwoTower

MIN_TRUSTED = 2
SEEN = 1024  # pairs in force that tell how near an image and its caption usually are


class OTCClip:
    """`--defense otcclip`.

    Args:
        alpha: level of every decision: the expected share of wrong pairs among those believed under a caption, at most.
        first_refresh, refresh: the model is asked first after so many training epochs, then every so many.
        grow: whether pairs may enter after the start. repair: whether images may learn under a matched caption.
        unlikely: p-value from which an own caption counts as random. confident: the share of the pairs in force whose
            image and caption a match must be nearer than.
        smoothing: part of every target that goes to all captions of the batch alike.
        lambda_ot, lambda_view: weights of the alignment losses across and within modalities; 0 leaves one out.
        local_share: weight of the transport term in d (METHOD section 1).
        warmup_epochs: caption-free epochs before training (METHOD section 2.1).

    Raises:
        UserError: an option out of its range.
    """

    name = "otcclip"

    def __init__(
        self,
        alpha: float = 0.05,
        confident: float = 0.9,
        unlikely: float = 0.2,
        first_refresh: int = 4,
        refresh: int = 4,
        repair: bool = True,
        grow: bool = True,
        smoothing: float = 0.5,
        lambda_ot: float = 0.2,
        lambda_view: float = 0.0,
        local_share: float = 0.5,
        warmup_epochs: int = 0,
    ) -> None:
        shares, weights = (confident, smoothing, local_share), (unlikely, lambda_ot, lambda_view)
        if not (
            0 < alpha < 1
            and all(0 <= share <= 1 for share in shares)
            and all(0 <= weight < math.inf for weight in weights)
            and min(first_refresh, refresh) >= 1
            and warmup_epochs >= 0
        ):
            raise UserError(
                "otcclip: alpha is in (0, 1), confident, smoothing and local_share are in 0..1, weights and unlikely 0 "
                "or more (above 1: nobody), first_refresh and refresh 1 or more, warmup_epochs 0 or more; got "
                f"alpha={alpha}, confident={confident}, smoothing={smoothing}, unlikely={unlikely}, "
                f"local_share={local_share}, lambda_ot={lambda_ot}, lambda_view={lambda_view}, "
                f"first_refresh={first_refresh}, refresh={refresh}, warmup_epochs={warmup_epochs}"
            )
        self.alpha, self.confident, self.unlikely = alpha, confident, unlikely
        self.first_refresh, self.refresh, self.repair, self.grow = first_refresh, refresh, repair, grow
        self.lambda_ot, self.lambda_view, self.local_share = lambda_ot, lambda_view, local_share
        self.smoothing = smoothing
        self.warmup_epochs = warmup_epochs
        self._warming_up = False
        self._belief: Belief | None = None
        self._action = torch.empty(0, dtype=torch.int8)
        self._caption = torch.empty(0, dtype=torch.int64)

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        pairs = context.pairs
        if self._belief is None:
            self._belief = self._start(pairs)
        self._warming_up = context.epoch < self.warmup_epochs
        if self._warming_up:
            return EpochPlan("warm-up", torch.arange(len(pairs)), pairs.caption_of, views=2)
        trained = context.epoch - self.warmup_epochs
        if trained >= self.first_refresh and (trained - self.first_refresh) % self.refresh == 0:
            self._ask_the_model(context.model, pairs, self._belief)
        if self.lambda_view > 0:
            held_back = self._action == HOLD_BACK
            caption_of = self._caption.masked_fill(held_back, -1)
            return EpochPlan("train", torch.arange(len(pairs)), caption_of, views=2)
        in_force = torch.nonzero(self._action != HOLD_BACK)[:, 0]
        if not len(in_force):
            raise UserError(f"otcclip: after {trained} epochs none of {len(pairs)} pairs is believed any more")
        return EpochPlan("train", spread(in_force, len(pairs)), self._caption)

    def _start(self, pairs: TrainingPairs) -> Belief:
        """Step 1: trust what look-alikes bear out."""
        if len(pairs) < 2:
            raise UserError("otcclip: 1 pair; it takes two to be each other's look-alikes")
        belief = Belief.gather(pairs.images, pairs.tokens, pairs.caption_of, self.alpha)
        trusted = belief.trusted()
        if int(trusted.sum()) < MIN_TRUSTED:
            raise UserError(
                f"otcclip: look-alikes bear out only {int(trusted.sum())} of {len(pairs)} pairs at alpha {self.alpha}; "
                f"with fewer than {MIN_TRUSTED} there is nothing to train on (too few pairs, or no two images alike)"
            )
        self._action = torch.where(trusted, KEEP, HOLD_BACK).to(torch.int8)
        self._caption = pairs.caption_of.clone()
        return belief

    @torch.no_grad()
    def _ask_the_model(self, model: TwoTower, pairs: TrainingPairs, belief: Belief) -> None:
        """Steps 2 and 3: judge every pair that is not in force, by a model that never trained on it."""
        outside = torch.nonzero(self._action != KEEP)[:, 0]
        if not len(outside):
            return
        own = pairs.caption_of[outside]
        text = encode_captions(model, pairs.tokens)
        judge = folded(model)
        image = encode_images(judge, pairs.images, rows=outside)
        share = own_share(image, text, own, local_share=self.local_share)
        trusted, leaves = belief.hear(outside, share, self._action == KEEP)
        self._action[leaves] = HOLD_BACK
        cosine = image.pooled @ text.pooled.T
        cosine[:, belief.closed] = -torch.inf  # nobody is re-paired to a closed claim
        nearness, best = cosine.max(dim=1)
        near = nearness >= self._usual_nearness(judge, pairs, text)
        seconded = belief.seconded(outside, best, self._caption, self._action != HOLD_BACK)
        random = belief.suspicion[outside] >= self.unlikely
        repaired = random & near & seconded & self.repair
        enters = trusted[outside] & self.grow
        self._action[outside] = torch.where(enters, KEEP, torch.where(repaired, REPAIR, HOLD_BACK)).to(torch.int8)
        self._caption[outside] = torch.where(repaired, best, own)

    def _usual_nearness(self, judge: TwoTower, pairs: TrainingPairs, text: Features) -> Tensor:
        """The cosine that a share `confident` of the pairs in force stays below: `SEEN` of them, evenly spread.
        Infinite where none is."""
        in_force = torch.nonzero(self._action == KEEP)[:, 0]
        if not len(in_force):
            return torch.tensor(torch.inf)
        rows = in_force[torch.linspace(0, len(in_force) - 1, min(len(in_force), SEEN)).round().long()]
        image = encode_images(judge, pairs.images, rows=rows)
        return (image.pooled * text.pooled[self._caption[rows]]).sum(dim=1).quantile(self.confident)

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        if self._warming_up:
            return _warm_up_step(batch, model)
        image = model.image(batch.images[0])
        if not len(batch.tokens):  # nobody in the batch has a caption: only views are left to learn from
            within = self.lambda_view * view_loss(image.pooled, model.image(batch.images[1]).pooled, temperature=0.1)
            return Step(within, {"views": within.detach()})
        text = model.text(batch.tokens)
        spoken, caption = _with_caption(image, batch.caption)
        loss = clip_loss(spoken.pooled, text.pooled, caption, model.logit_scale, self._targets(batch))
        terms = {"clip": loss.detach()}
        if self.lambda_view > 0:
            view = model.image(batch.images[1])
            within = view_loss(image.pooled, view.pooled, temperature=0.1)
            loss = loss + self.lambda_view * within
            terms["views"] = within.detach()
        if self.lambda_ot > 0:
            aligned = ot_alignment_loss(spoken, text, caption, negatives=7, temperature=0.1)
            loss = loss + self.lambda_ot * aligned
            terms["ot"] = aligned.detach()
        return Step(loss, terms)

    def _targets(self, batch: PairBatch) -> Tensor | None:
        """`[u, u]`, how right each of the batch's captions is where another one belongs: what says nearly the same is
        nearly right (agreement, in shares), and a part `smoothing` of the whole goes to all alike.

        None where nothing has been gathered: a step without an epoch knows captions by number alone.
        """
        if self._belief is None:
            return None
        captions = caption_ids(batch, self._caption)
        weight = self._belief.agreement[captions[:, None], captions]
        weight.fill_diagonal_(1.0)  # a caption without a real token agrees with itself all the same
        return smoothed(weight / weight.sum(dim=1, keepdim=True), self.smoothing).to(batch.tokens.device)

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        if self._belief is None:
            n = len(pairs)
            return Decisions(np.full(n, HOLD_BACK, np.int8), pairs.caption_of.numpy(), np.full(n, np.nan))
        return Decisions(self._action.numpy(), self._caption.numpy(), self._belief.suspicion.double().numpy())

    def state_dict(self) -> dict[str, Any]:
        if self._belief is None:
            return {}
        return {
            "belief": self._belief.state_dict(),
            "action": self._action,
            "caption": self._caption,
            "warming_up": self._warming_up,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self._belief = Belief(**state["belief"])
        self._action, self._caption, self._warming_up = state["action"], state["caption"], state["warming_up"]


def _with_caption(image: Features, caption: Tensor) -> tuple[Features, Tensor]:
    """The images that learn under a caption, and those captions."""
    rows = torch.nonzero(caption >= 0)[:, 0]
    if len(rows) == len(caption):
        return image, caption
    return Features(image.pooled[rows], image.local.take(rows)), caption[rows]


def _warm_up_step(batch: PairBatch, model: TwoTower) -> Step:
    """Each modality alone: two views of an image; the captions meet no image."""
    one, two = (model.image(view).pooled for view in batch.images)
    loss = view_loss(one, two, temperature=0.1)
    return Step(loss, {"image views": loss.detach()})
