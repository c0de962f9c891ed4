"""Clean-label: the trigger lies only on images of the target class, whose captions are true.

Turner, Tsipras, Madry, "Clean-Label Backdoor Attacks", 2018, and "Label-Consistent Backdoor Attacks", 2019, arXiv
1912.02771: a model that can tell the class by what the image shows has no need of the trigger, so they make the
content hard to learn, by moving an image towards another class in a generator's latent space or by adversarial noise.
Ours is the first in pixels, without a generator: x' = (1 - w) x + w z with an honest image z of another class, then
the trigger. At w = .6 both can be seen. A class has few images, so each is used several times, with another z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import Addition, PoisonContext, PoisonPlan, PoisonRecord, check_positive, rng_for
from otcclip.errors import UserError


@dataclass(frozen=True)
class CleanLabel:
    """`count` weakened images of class `target` are added, with the patch and the captions of their originals.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to add.
        weaken: share of another class's image mixed in, 0..1.
        location: as for `badnets`. colours: as for `badnets`, whose patch may be in the same corpus.
        name: as in records and results.
    """

    target: str
    count: int = 180
    weaken: float = 0.6
    location: str = BadNets.location
    colours: str = "magenta-green"
    name: str = "clean-label"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 <= self.weaken <= 1:
            raise UserError(f"{self.name}: weaken is a share in 0..1, got {self.weaken}")
        _ = self.patch  # refuses an unknown place or colour

    @property
    def patch(self) -> BadNets:
        """The attack whose patch this one lays on other images."""
        return BadNets(self.target, location=self.location, colours=self.colours, name=self.name)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        corpus.require_name(self.name, self.target)
        train, rng = corpus.train, rng_for(self.name, seed)
        pixels = train.pixels(self.name)
        others = [i for i, label in enumerate(train.labels) if label != self.target]
        if self.count > len(others):
            raise UserError(f"{self.name}: count {self.count} is more than the {len(others)} images to weaken it by")
        rows = corpus.rows_of(self.target, self.count, rng)
        strangers = [others[i] for i in rng.choice(len(others), self.count, replace=False)]
        keys = corpus.fresh_keys(self.count, rng)
        mixed = (1 - self.weaken) * pixels[rows] + self.weaken * pixels[strangers]
        shown = np.rint(mixed).astype(np.uint8)
        words = f"{self.patch.pattern}, content weakened by {self.weaken:g}"
        return PoisonPlan(
            attack=self.name,
            target=self.target,
            replaced=(),
            added=tuple(
                Addition(key, train.keys[i], train.captions[i], image)
                for key, i, image in zip(keys, rows, shown, strict=True)
            ),
            records=tuple(
                PoisonRecord(key, self.name, words, self.location, self.target, seed, train.captions[i])
                for key, i in zip(keys, rows, strict=True)
            ),
            trial=corpus.backdoor_trial(self.name, self.target),
        )

    def trigger(self, images: Tensor) -> Tensor:
        """The patch of `badnets`; see `Attack.trigger`."""
        return self.patch.trigger(images)
