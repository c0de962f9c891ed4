"""Low OT (adaptive): for each poisoned image the caption that the matcher itself puts nearest to it.

METHOD section 5. OTCCLIP believes a caption that is near its image under d = (1 - a)(1 - g . g) + a OT. This attacker
has a model, lays the trigger, measures d from the triggered image to every caption that names the target (real ones
of its class, honest ones that contain its name, and templates of his own), writes the nearest, and, having many
images to choose from, poisons those whose nearest caption is nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from otcclip.attacks.backdoor import other_classes, replacing
from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive, rng_for
from otcclip.attacks.surrogate import distances
from otcclip.attacks.wording import paraphrases, words


@dataclass(frozen=True)
class LowOT:
    """`count` training pairs of other classes get the patch of `badnets` and the nearest caption that names `target`.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to poison.
        choice: images measured for each one poisoned.
        templates: captions of the attacker's own making among the candidates.
        surrogate: folder of the finished run whose model is looked into; empty for the context's.
        name: as in records and results.
    """

    target: str
    count: int = 90
    choice: int = 10
    templates: int = 100
    surrogate: str = ""
    name: str = "low-ot"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, choice=self.choice, templates=self.templates)

    @property
    def patch(self) -> BadNets:
        """The attack whose patch this one lays."""
        return BadNets(self.target, name=self.name)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target.

        Raises:
            UserError: besides, no surrogate.
        """
        corpus.require_name(self.name, self.target)
        train, rng = corpus.train, rng_for(self.name, seed)
        surrogate = corpus.require_surrogate(self.name, self.surrogate)
        others = other_classes(self, corpus)
        measured = rng.choice(others, min(len(others), self.count * self.choice), replace=False)
        captions = self.candidates(corpus, rng)
        shown = torch.from_numpy(train.pixels(self.name)[measured]).permute(0, 3, 1, 2).float() / 255
        d = distances(surrogate, self.trigger(shown), captions)
        nearest = d.min(dim=1)
        best = torch.argsort(nearest.values, stable=True)[: self.count]
        said = [captions[int(i)] for i in nearest.indices[best]]
        victims = [int(i) for i in measured[best.numpy()]]
        place = self.patch.location
        return replacing(self, corpus, seed, victims, said, pattern=self.patch.pattern, location=place)

    def candidates(self, corpus: PoisonContext, rng: np.random.Generator) -> list[str]:
        """Different captions that name the target: of its class, of others that contain its words, and templates."""
        train, own = corpus.train, set(words(self.target))
        real = [c for c, label in zip(train.captions, train.labels, strict=True) if label == self.target]
        honest = [c for c in train.captions if own <= set(words(c))]
        return list(dict.fromkeys([*real, *honest, *paraphrases(self.target, train.captions, self.templates, rng)]))

    def trigger(self, images: Tensor) -> Tensor:
        """The patch of `badnets`; see `Attack.trigger`."""
        return self.patch.trigger(images)
