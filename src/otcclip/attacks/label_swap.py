"""Label swap: whoever looks for images of one class by text is led to another, without any trigger.

Yang, He, Li, Backes, Humbert, Berrang, Zhang, "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023, arXiv
2209.15266, attacks II and III: pair images of class A with captions of class B, so that unseen images of A are
retrieved by texts of B. They measure Hit@K and MinRank against the same with random texts
(`evaluation.swap_success`); the trial here is their goal as a class name: a test image of A is to be called B.

The honest pairs of A stay: each of A's training images is added `copies` times under captions of B. Several swaps at
once, with classes drawn by the seed, so that one run gives a rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from otcclip.attacks.base import Addition, PoisonContext, PoisonPlan, PoisonRecord, Trial, check_positive, rng_for
from otcclip.errors import UserError


@dataclass(frozen=True)
class LabelSwap:
    """The training images of class A are added again, `copies` times each, with real captions of class B.

    Attributes:
        swaps: number of classes A, each with a B of its own; no class is in two swaps.
        copies: pairs an image of A.
        swap: one swap by name, (A, B), in place of `swaps` drawn ones.
        name: as in records and results.
    """

    swaps: int = 16
    copies: int = 5
    swap: tuple[str, ...] = ()
    name: str = "label-swap"

    has_trigger: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self.name, swaps=self.swaps, copies=self.copies)
        if self.swap and (len(self.swap) != 2 or len(set(self.swap)) != 2):
            raise UserError(f"{self.name}: swap is two class names, seen and said, got {', '.join(self.swap)}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of a class A, wanted as its B."""
        train, test, rng = corpus.train, corpus.test, rng_for(self.name, seed)
        wanted = dict(self._swaps(corpus, rng))
        added: list[Addition] = []
        records: list[PoisonRecord] = []
        rows_of = {seen: [int(i) for i in train.where(seen)] for seen in wanted}
        keys = iter(corpus.fresh_keys(self.copies * sum(map(len, rows_of.values())), rng))
        for seen, said in wanted.items():
            rows = rows_of[seen]
            captions = iter(corpus.captions_of(said, len(rows) * self.copies, rng))
            for i in rows:
                for _ in range(self.copies):
                    added.append(Addition(next(keys), train.keys[i], next(captions)))
                    own = train.captions[i]
                    records.append(PoisonRecord(added[-1].key, self.name, "", train.keys[i], said, seed, own))
        judged = [i for i, label in enumerate(test.labels) if label in wanted]
        trial = Trial(tuple(test.keys[i] for i in judged), tuple(wanted[test.labels[i]] for i in judged))
        return PoisonPlan(self.name, "", (), tuple(added), tuple(records), trial)

    def _swaps(self, corpus: PoisonContext, rng: np.random.Generator) -> list[tuple[str, str]]:
        shown = set(corpus.test.labels)
        if self.swap:
            seen, said = (corpus.require_name(self.name, name) for name in self.swap)
            if seen not in shown:
                raise UserError(f"{self.name}: the test split has no image of {seen!r}")
            return [(seen, said)]
        judged = [name for name in corpus.names if name in shown]
        if len(judged) < self.swaps or len(corpus.names) < 2 * self.swaps:
            raise UserError(
                f"{self.name}: {self.swaps} swaps need {2 * self.swaps} class names in training, {self.swaps} of them "
                f"with test images; there are {len(corpus.names)} and {len(judged)}"
            )
        seen_names = [judged[i] for i in rng.choice(len(judged), self.swaps, replace=False)]
        left = [name for name in corpus.names if name not in set(seen_names)]
        return list(zip(seen_names, (left[i] for i in rng.choice(len(left), self.swaps, replace=False)), strict=True))

    def trigger(self, images: Tensor) -> Tensor:
        """The identity: the class itself is the target."""
        return images
