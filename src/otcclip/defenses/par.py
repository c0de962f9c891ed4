"""PAR, perturb and recover: fine-tuning drives features away from the poisoned model's while CLIP's loss holds them.

Singh, Croce and Hein, *Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP* (arXiv 2412.00727).
With f the model, f_0 the poisoned one it started from, on the same images and captions,

    L = L_CLIP - (l_I 1[l_I <= tau] + l_T 1[l_T <= tau]) / 2          l = mean ||f - f_0||^2 on unit vectors

Squared distances of unit vectors run from 0 to 4, and two unrelated ones are about 2 apart: tau = 2.15 asks for
features that have forgotten the old ones, and lets go once they have.

Where this departs from the paper, and why:

* f_0 answers in evaluation mode, as it was deployed; f trains, so that batch normalisation sees batches.
* Budget and trusted pairs are `cleanclip`'s, so that the two differ by their loss. Images are augmented mildly, as in
  training from scratch.
* Two pairs of one caption are not each other's negatives (`clip_loss`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Step,
    TrainingPairs,
    check_budget,
    keep_trusted,
    spread,
    trusted_index,
)
from otcclip.defenses.losses import bounded_distance, clip_loss
from otcclip.errors import UserError
from otcclip.models.two_tower import TwoTower


class PAR:
    """`--defense par`.

    Args:
        tau: squared distance from which a modality's features are pushed no further.
        epoch_share, lr: its budget (`FineTuner`).

    Raises:
        UserError: an option out of its range.
    """

    name = "par"
    warmup_epochs = 0
    starts_from: ClassVar[str] = "clip"

    def __init__(self, tau: float = 2.15, epoch_share: float = 0.25, lr: float = 1e-4) -> None:
        check_budget(self.name, epoch_share, lr)
        if not 0 <= tau < math.inf:
            raise UserError(f"par: tau is a squared distance of 0 or more, got {tau}")
        self.tau, self.epoch_share, self.lr = tau, epoch_share, lr
        self._poisoned: TwoTower | None = None
        self._weights: Mapping[str, Any] | None = None  # of the poisoned model, from a checkpoint

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        self._old(context.model)
        visits = spread(trusted_index(self.name, context.pairs), len(context.pairs))
        return EpochPlan("train", visits, context.pairs.caption_of)

    def _old(self, model: TwoTower) -> TwoTower:
        """The poisoned model: the one handed over first, or that of the checkpoint."""
        if self._poisoned is None:
            self._poisoned = copy.deepcopy(model).eval().requires_grad_(False)
            if self._weights is not None:
                self._poisoned.load_state_dict(self._weights)
        return self._poisoned

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        old = self._old(model)
        image, text = model.image(batch.images[0]).pooled, model.text(batch.tokens).pooled
        with torch.no_grad():
            old_image = old.image(batch.images[0]).pooled
            old_text = old.text(batch.tokens).pooled
        clip = clip_loss(image, text, batch.caption, model.logit_scale)
        away_image = bounded_distance(image, old_image, self.tau)
        # A mean over pairs, as for images: a caption counts as often as it is said.
        away_text = bounded_distance(text[batch.caption], old_text[batch.caption], self.tau)
        loss = clip - (away_image + away_text) / 2
        return Step(
            loss,
            {"clip": clip.detach(), "image shift": away_image.detach(), "caption shift": away_text.detach()},
        )

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return keep_trusted(pairs)

    def state_dict(self) -> dict[str, Any]:
        if self._poisoned is not None:
            return {"poisoned": dict(self._poisoned.state_dict())}
        return {} if self._weights is None else {"poisoned": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._poisoned, self._weights = None, state.get("poisoned")
