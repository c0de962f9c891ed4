"""CleanCLIP: a poisoned model is fine-tuned on pairs that somebody vouches for, each modality also with itself.

Bansal, Singhi, Yang, Yin, Grover and Chang, *CleanCLIP: Mitigating Data Poisoning Attacks in Multimodal Contrastive
Learning*, ICCV 2023 (arXiv 2303.03323). With an augmented view I' of an image, T' of a caption,

    L = L_CLIP + lambda (CE(I, I') + CE(T, T')) / 2

at the model's own temperature. The trigger and the target's captions have nothing to hold on to in the second term.

Where this departs from the paper, and why:

* Budget: published are ten epochs over 100,000 trusted pairs of 3 million, at a rate of 1e-5. Here an epoch visits as
  many pairs as one of the training it follows (the trusted ones over and over: epochs of a small trusted set would be a
  handful of steps); a quarter as many epochs, at 1e-4, a fifteenth of the demo's rate.
* T' loses words at random; the paper's other edits need a thesaurus. I' is the house's strong augmentation.
* Two pairs of one caption are not each other's negatives (`clip_loss`), nor are two visits to one image: so small a
  trusted set has a quarter of its images in a batch twice.
"""

from __future__ import annotations

import math
from typing import ClassVar

from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Stateless,
    Step,
    TrainingPairs,
    check_budget,
    keep_trusted,
    spread,
    trusted_index,
)
from otcclip.defenses.losses import clip_loss, partner_loss
from otcclip.errors import UserError
from otcclip.models.two_tower import TwoTower


class CleanCLIP(Stateless):
    """`--defense cleanclip`.

    Args:
        lambda_view: weight of the second term; 0 is plain fine-tuning.
        epoch_share, lr: its budget (`FineTuner`).

    Raises:
        UserError: an option out of its range.
    """

    name = "cleanclip"
    warmup_epochs = 0
    starts_from: ClassVar[str] = "clip"

    def __init__(self, lambda_view: float = 1.0, epoch_share: float = 0.25, lr: float = 1e-4) -> None:
        check_budget(self.name, epoch_share, lr)
        if not 0 <= lambda_view < math.inf:
            raise UserError(f"cleanclip: lambda_view is 0 or more, got {lambda_view}")
        self.lambda_view, self.epoch_share, self.lr = lambda_view, epoch_share, lr

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        return EpochPlan(
            "train",
            spread(trusted_index(self.name, context.pairs), len(context.pairs)),
            context.pairs.caption_of,
            views=2,
            text_views=2,
            strong="further",
        )

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, view = (model.image(images).pooled for images in batch.images)
        text, said = (model.text(tokens).pooled for tokens in (batch.tokens, *batch.token_views))
        clip = clip_loss(image, text, batch.caption, model.logit_scale)
        images = partner_loss(image, view, model.logit_scale, batch.index.to(image.device))
        within = (images + partner_loss(text, said, model.logit_scale)) / 2
        return Step(clip + self.lambda_view * within, {"clip": clip.detach(), "views": within.detach()})

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_trusted(pairs)
