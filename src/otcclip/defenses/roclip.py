"""RoCLIP: every K-th epoch an image learns under the caption of a small changing pool that is most like it.

Yang, Gao and Mirzasoleiman, *Robust Contrastive Language-Image Pretraining against Data Poisoning and Backdoor
Attacks*, NeurIPS 2023 (arXiv 2303.06854). In a matching epoch, with a pool P of captions and unit vectors g,

    t(i) = argmax_{c in P} cos(g_i, g_c)          L = CLIP loss of the pairs (i, t(i))

and P takes in the batch's captions after every step, first in, first out. In the other epochs L is the CLIP loss of the
pairs as they stand; their captions pass through P as well. Images and captions are strongly augmented throughout. A
poisoned caption is rarely in a pool of 2 % of the data, so its image is pulled elsewhere before the two can bind.

`detached`, as published: the pool's vectors are constants, so a matching epoch trains the image tower alone (and the
temperature). `live`: the captions that were matched are encoded again, with gradient.

Where this departs from the paper, and why:

* K = 2 by default, as in `otcclip-paper`, so that the two differ in what they match by. The paper sweeps it.
* Two images matched to one caption are not each other's negatives (`clip_loss`), and the pool holds a caption once: the
  same rule for every defence here.
* Captions are augmented by cropping and by dropping words; the paper's other edits need a thesaurus.
* The pool starts from random captions of the data, encoded by the model before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from otcclip.defenses.base import (
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Step,
    TrainingPairs,
    matched,
)
from otcclip.defenses.losses import clip_loss
from otcclip.defenses.pool import Pool, caption_ids, pool_size
from otcclip.errors import UserError
from otcclip.models.encode import encode_captions
from otcclip.models.two_tower import TwoTower


class RoCLIP:
    """`--defense roclip`.

    Args:
        every: K; epochs `K - 1, 2K - 1, ...` match, the others train on the pairs as they stand.
        pool: captions in the pool, as a share of the pairs.
        variant: `detached` or `live`.
    """

    name = "roclip"
    warmup_epochs = 0

    def __init__(self, every: int = 2, pool: float = 0.02, variant: Literal["detached", "live"] = "detached") -> None:
        if every < 1 or not 0 < pool <= 1 or variant not in ("detached", "live"):
            raise UserError(
                f"roclip: every={every}, pool={pool}, variant={variant!r}: every is 1 or more, pool a share in (0, 1], "
                "variant 'detached' or 'live'"
            )
        self.every, self.share, self.live = every, pool, variant == "live"
        self._pool: Pool | None = None
        self._own = torch.empty(0, dtype=torch.int64)
        self._matching = False
        self._caption: Tensor | None = None  # in force: a pair's own until a matching epoch has visited it

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        pairs = context.pairs
        self._own = pairs.caption_of
        self._caption = pairs.caption_of.clone()
        self._matching = context.epoch % self.every == self.every - 1
        if self._pool is None:
            self._pool = Pool(pool_size(self.share, len(pairs), len(pairs.tokens)))
            drawn = torch.randperm(len(pairs.tokens))[: self._pool.size]
            text = encode_captions(context.model, pairs.tokens[drawn])
            self._pool.push(drawn, text.pooled, tokens=pairs.tokens[drawn].to(text.pooled.device))
        # In a matching epoch too the plan names own captions: they feed the pool, and `step` finds those in force.
        return EpochPlan("train", torch.arange(len(pairs)), pairs.caption_of, strong="all")

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        assert self._pool is not None
        image = model.image(batch.images[0]).pooled
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._matching):
            own = model.text(batch.tokens).pooled
        if self._matching:
            text, caption = self._match(image, batch, model)
        else:
            text, caption = own, batch.caption
        loss = clip_loss(image, text, caption, model.logit_scale)
        self._pool.push(caption_ids(batch, self._own), own, tokens=batch.tokens)
        return Step(loss, {"match" if self._matching else "clip": loss.detach()})

    def _match(self, image: Tensor, batch: PairBatch, model: TwoTower) -> tuple[Tensor, Tensor]:
        """The pool captions that the batch's images are matched to, `[u, d]`, and each image's among them, `[b]`."""
        assert self._pool is not None and self._caption is not None
        nearest = self._pool.nearest(image)
        self._caption[batch.index] = self._pool.columns["id"][nearest]
        used, caption = torch.unique(nearest, return_inverse=True)
        caption = caption.to(image.device)
        if self.live:
            return model.text(self._pool.columns["tokens"][used]).pooled, caption
        return self._pool.columns["vector"][used], caption

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        return matched(pairs, self._caption)

    def state_dict(self) -> dict[str, Any]:
        if self._pool is None or self._caption is None:
            return {}
        return {
            "pool": self._pool.state_dict(),
            "size": self._pool.size,
            "own": self._own,
            "matching": self._matching,
            "caption": self._caption,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self._pool = Pool(int(state["size"]))
            self._pool.load_state_dict(state["pool"])
            self._own, self._caption = state["own"], state["caption"]
            self._matching = bool(state["matching"])
