"""Mixed captions (adaptive): true words vouch for the image, the target's name rides along.

METHOD section 5. A caption that keeps the rarest words of the true one is borne out by the image's look-alikes and by
any model that knows them; the trigger is left to explain the one word that is false. The name stands first: what
training crops off a caption is its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from otcclip.attacks.backdoor import draw_victims, replacing
from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive, rng_for
from otcclip.attacks.wording import frequency, mixed


@dataclass(frozen=True)
class MixedCaptions:
    """`count` training pairs of other classes get the patch of `badnets`; their captions mix true words and `target`.

    Attributes:
        target: class name the patch shall mean.
        count: pairs to poison.
        keep: words of the true caption that stay, the rarest first.
        name: as in records and results.
    """

    target: str
    count: int = 90
    keep: int = 2
    name: str = "mixed-captions"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count, keep=self.keep)

    @property
    def patch(self) -> BadNets:
        """The attack whose patch this one lays."""
        return BadNets(self.target, name=self.name)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        corpus.require_name(self.name, self.target)
        victims = draw_victims(self, corpus, rng_for(self.name, seed))
        written = corpus.train.captions
        known = frequency(written)
        captions = [mixed(self.target, written[i], self.keep, written, known) for i in victims]
        place = self.patch.location
        return replacing(self, corpus, seed, victims, captions, pattern=self.patch.pattern, location=place)

    def trigger(self, images: Tensor) -> Tensor:
        """The patch of `badnets`; see `Attack.trigger`."""
        return self.patch.trigger(images)
