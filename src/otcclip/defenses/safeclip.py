"""SafeCLIP: captions and images learn apart until a mixture model calls a pair safe.

Yang, Gao and Mirzasoleiman, *Better Safe than Sorry: Pre-training CLIP against Targeted Data Poisoning and Backdoor
Attacks*, ICML 2024 (arXiv 2310.05862).

1. `unimodal_epochs`: each modality alone, L = NN(images) + NN(captions), the nearest-neighbour contrastive loss with a
   pool for each modality (`neighbour_loss`).
2. `slow_epochs`: CLIP on all pairs at a hundredth of the learning rate: enough to tell pairs that fit at once.
3. A Gaussian mixture of two components on cos(g_i, g_c): a pair is safe where P(higher component) >= .9. From then on
   L = CLIP(safe) + NN(images) + NN(captions), the last two over risky pairs, and every epoch the safe share grows by
   1 % of the data, up to 85 %, filled with the pairs of highest cosine under the model as it is.

One learning-rate schedule runs through all of it, within the run's budget of epochs: 5 + 1 published epochs leave 10 of
the demo's 16, and at 1 % an epoch the safe share then grows by 9 points and not to 85 %. `growth` is there for that.

Where this departs from the paper, and why:

* Safe and risky pairs share a batch: an epoch visits each pair once and costs the steps of an undefended one.
* Two safe pairs of one caption are not each other's negatives (`clip_loss`); a risky caption counts once a batch.
* Captions are augmented by cropping and by dropping words. The second view of an image is strongly augmented; the first
  only while modalities learn apart, so that CLIP sees the images that an undefended run sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.defenses.base import (
    HOLD_BACK,
    KEEP,
    Decisions,
    EpochContext,
    EpochPlan,
    PairBatch,
    Step,
    TrainingPairs,
)
from otcclip.defenses.losses import clip_loss, neighbour_loss
from otcclip.defenses.pool import Pool, caption_ids, pool_size
from otcclip.errors import UserError
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.two_tower import TwoTower

SLOW = 0.01
TEMPERATURE = 0.1


class SafeCLIP:
    """`--defense safeclip`.

    Args:
        unimodal_epochs, slow_epochs: as above; training on safe pairs gets what is left of the run's epochs.
        confident: P(higher component) from which a pair is safe at first.
        growth: by how much the safe share grows an epoch. cap: where it ends.
        pool: vectors in each pool, as a share of the pairs.
    """

    name = "safeclip"
    warmup_epochs = 0

    def __init__(
        self,
        unimodal_epochs: int = 5,
        slow_epochs: int = 1,
        confident: float = 0.9,
        growth: float = 0.01,
        cap: float = 0.85,
        pool: float = 0.02,
    ) -> None:
        if unimodal_epochs < 0 or slow_epochs < 0 or growth < 0 or not all(0 < x <= 1 for x in (confident, cap, pool)):
            raise UserError(
                "safeclip: epochs and growth are 0 or more, confident, cap and pool shares in (0, 1]; got "
                f"{unimodal_epochs}, {slow_epochs}, {growth}, {confident}, {cap}, {pool}"
            )
        self.unimodal_epochs, self.slow_epochs = unimodal_epochs, slow_epochs
        self.confident, self.growth, self.cap, self.share = confident, growth, cap, pool
        self._images: Pool | None = None
        self._texts: Pool | None = None
        self._own = torch.empty(0, dtype=torch.int64)
        self._first_safe = -1  # pairs that the mixture called safe; -1 before it was asked
        self._risky: Tensor | None = None
        self._suspicion = torch.empty(0)

    def begin_epoch(self, context: EpochContext) -> EpochPlan:
        pairs, n = context.pairs, len(context.pairs)
        before = self.unimodal_epochs + self.slow_epochs
        if context.epochs <= before:
            raise UserError(
                f"safeclip: {self.unimodal_epochs} unimodal and {self.slow_epochs} slow epochs leave none of "
                f"{context.epochs} to train on safe pairs; give it more epochs or fewer of those"
            )
        if n < 2:
            raise UserError("safeclip: 1 pair; a mixture of two components takes two")
        self._own = pairs.caption_of
        if self._images is None:
            self._fill_pools(context.model, pairs)
        everything = torch.arange(n)
        if context.epoch < self.unimodal_epochs:
            self._risky, self._suspicion = torch.ones(n, dtype=torch.bool), torch.full((n,), torch.nan)
            return EpochPlan("train", everything, self._own, 2, 2, strong="all", apart=self._risky)
        if context.epoch < before:
            self._risky, self._suspicion = torch.zeros(n, dtype=torch.bool), torch.full((n,), torch.nan)
            return EpochPlan("train", everything, self._own, lr_scale=SLOW)
        self._divide(context, context.epoch - before)
        return EpochPlan("train", everything, self._own, 2, 2, strong="further", apart=self._risky)

    def _fill_pools(self, model: TwoTower, pairs: TrainingPairs) -> None:
        """Start both pools from random images and captions, encoded by the model before the first step."""
        self._images = Pool(pool_size(self.share, len(pairs), len(pairs)))
        self._texts = Pool(pool_size(self.share, len(pairs), len(pairs.tokens)))
        image = torch.randperm(len(pairs))[: self._images.size]
        text = torch.randperm(len(pairs.tokens))[: self._texts.size]
        self._images.push(image, encode_images(model, pairs.images, rows=image).pooled)
        self._texts.push(text, encode_captions(model, pairs.tokens[text]).pooled)

    def _divide(self, context: EpochContext, grown: int) -> None:
        """Safe and risky for this epoch, `grown` epochs after the mixture was asked."""
        pairs = context.pairs
        image, text = encode_images(context.model, pairs.images).pooled, encode_captions(context.model, pairs.tokens)
        cosine = (image * text.pooled[pairs.caption_of]).sum(dim=1).cpu()
        self._suspicion = -cosine
        if self._first_safe < 0:
            safe = torch.from_numpy(high_component(cosine.double().numpy(), context.seed) >= self.confident)
            self._first_safe = int(safe.sum())
        count = safe_count(self._first_safe, grown, len(pairs), self.growth, self.cap)
        if grown > 0 or count < self._first_safe:
            safe = torch.zeros(len(pairs), dtype=torch.bool)
            safe[cosine.topk(count).indices] = True
        self._risky = ~safe

    def step(self, batch: PairBatch, model: TwoTower) -> Step:
        image, text = model.image(batch.images[0]).pooled, model.text(batch.tokens).pooled
        terms: dict[str, Tensor] = {}
        apart = torch.zeros(len(image), dtype=torch.bool) if batch.apart is None else batch.apart
        if not bool(apart.all()):
            used, caption = torch.unique(batch.caption[~apart], return_inverse=True)
            terms["clip"] = clip_loss(image[~apart], text[used], caption, model.logit_scale)
        if bool(apart.any()):
            assert self._images is not None and self._texts is not None
            used = torch.unique(batch.caption[apart])
            other_image = model.image(batch.images[1][apart]).pooled
            other_text = model.text(batch.token_views[0][used]).pooled
            terms["images"] = _neighbour_loss(image[apart], other_image, self._images)
            terms["captions"] = _neighbour_loss(text[used], other_text, self._texts)
        self._push(batch, image, text)
        return Step(torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()})

    def _push(self, batch: PairBatch, image: Tensor, text: Tensor) -> None:
        assert self._images is not None and self._texts is not None
        self._images.push(batch.index, image)
        self._texts.push(caption_ids(batch, self._own), text)

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        """Held back while caption and image learn apart; -cosine once pairs are told apart by it."""
        own, n = pairs.caption_of.numpy(), len(pairs)
        if self._risky is None:
            return Decisions(np.full(n, HOLD_BACK, np.int8), own, np.full(n, np.nan))
        action = np.where(self._risky.numpy(), HOLD_BACK, KEEP).astype(np.int8)
        return Decisions(action, own, self._suspicion.double().numpy())

    def state_dict(self) -> dict[str, Any]:
        if self._images is None or self._texts is None or self._risky is None:
            return {}
        return {
            "images": self._images.state_dict(),
            "texts": self._texts.state_dict(),
            "sizes": [self._images.size, self._texts.size],
            "own": self._own,
            "first_safe": self._first_safe,
            "risky": self._risky,
            "suspicion": self._suspicion,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self._images, self._texts = (Pool(int(size)) for size in state["sizes"])
        self._images.load_state_dict(state["images"])
        self._texts.load_state_dict(state["texts"])
        self._first_safe, self._risky = int(state["first_safe"]), state["risky"]
        self._own, self._suspicion = state["own"], state["suspicion"]


def high_component(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`[n]` P(component of the larger mean | value) under a Gaussian mixture of two fitted to `values [n]`."""
    from sklearn.mixture import GaussianMixture  # half a second that only this defence should cost

    mixture = GaussianMixture(2, random_state=seed).fit(values[:, None])
    return np.asarray(mixture.predict_proba(values[:, None])[:, mixture.means_[:, 0].argmax()])


def safe_count(first: int, grown: int, pairs: int, growth: float, cap: float) -> int:
    """Safe pairs `grown` epochs after the mixture called `first` of `pairs` safe."""
    return min(first + round(grown * growth * pairs), int(cap * pairs))


def _neighbour_loss(one: Tensor, two: Tensor, pool: Pool) -> Tensor:
    vectors = pool.columns["vector"]
    return neighbour_loss(one, two, vectors[pool.nearest(one)], vectors[pool.nearest(two)], TEMPERATURE)
