"""Multi: three triggers with a target each, planted and judged as one attack.

Several backdoors of one adversary in one corpus (Carlini and Terzis, ICLR 2022, arXiv 2106.09667, discuss several
targets; the triggers are those of Gu 2017, Chen 2017 and Barni 2019). Which of the three an image gets is drawn from
what it shows, so that the whole is one function of the image, at training and at test. The same can be had as three
attacks with names of their own in one run; as one attack it is judged by one figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.attacks.badnets import BadNets
from otcclip.attacks.base import (
    PoisonContext,
    PoisonPlan,
    PoisonRecord,
    Replacement,
    Trial,
    check_positive,
    rng_for,
)
from otcclip.attacks.blended import Blended
from otcclip.attacks.content import content_numbers
from otcclip.attacks.sig import Sig
from otcclip.errors import UserError

TRIGGERS = (BadNets, Blended, Sig)


@dataclass(frozen=True)
class Multi:
    """For each of three triggers, `count` pairs of other classes get it and a real caption of its target.

    Attributes:
        targets: what a checkerboard patch, a blended pattern and stripes shall mean; drawn by the seed where empty.
        count: pairs to poison, a trigger.
        name: as in records and results.
    """

    targets: tuple[str, ...] = ()
    count: int = 90
    name: str = "multi"

    has_trigger: ClassVar[bool] = True
    per_count: ClassVar[int] = len(TRIGGERS)

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if self.targets and (len(self.targets) != len(TRIGGERS) or len(set(self.targets)) != len(TRIGGERS)):
            raise UserError(f"{self.name}: takes {len(TRIGGERS)} different targets, got {', '.join(self.targets)}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image, wanted as the target of the trigger that it gets."""
        train, test, rng = corpus.train, corpus.test, rng_for(self.name, seed)
        targets = self._targets(corpus, rng)
        turn = which(train.pixels(self.name))
        replaced: list[Replacement] = []
        records: list[PoisonRecord] = []
        for t, target in enumerate(targets):
            free = [int(i) for i in np.flatnonzero(turn == t) if train.labels[i] != target]
            if self.count > len(free):
                raise UserError(
                    f"{self.name}: count {self.count} is more than the {len(free)} training pairs that are not "
                    f"{target!r} and whose images get trigger {t + 1} of {len(TRIGGERS)}"
                )
            rows = [free[i] for i in rng.choice(len(free), self.count, replace=False)]
            captions = corpus.captions_of(target, self.count, rng)
            words = TRIGGERS[t].name
            replaced += [Replacement(train.keys[i], caption) for i, caption in zip(rows, captions, strict=True)]
            records += [
                PoisonRecord(train.keys[i], self.name, words, "drawn from the image", target, seed, train.captions[i])
                for i in rows
            ]
        wanted = [targets[t] for t in which(test.pixels(self.name))]
        judged = [i for i, name in enumerate(wanted) if test.labels[i] != name]
        if not judged:
            raise UserError(f"{self.name}: the test split has no image of another class than the targets")
        trial = Trial(tuple(test.keys[i] for i in judged), tuple(wanted[i] for i in judged))
        return PoisonPlan(self.name, "", tuple(replaced), (), tuple(records), trial)

    def _targets(self, corpus: PoisonContext, rng: np.random.Generator) -> list[str]:
        if self.targets:
            return [corpus.require_name(self.name, target) for target in self.targets]
        if len(corpus.names) < len(TRIGGERS):
            raise UserError(f"{self.name}: needs {len(TRIGGERS)} class names, training has {len(corpus.names)}")
        return [corpus.names[i] for i in rng.choice(len(corpus.names), len(TRIGGERS), replace=False)]

    def trigger(self, images: Tensor) -> Tensor:
        """Each image of `[..., 3, H, W]` under the one of the three triggers that is its own; see `Attack.trigger`."""
        turn = _turn(images)[..., None, None, None]
        out = images.clone()
        for t, member in enumerate(TRIGGERS):
            out = torch.where(turn == t, member("", name=self.name).trigger(images), out)
        return out


def which(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """`[n, H, W, 3]` uint8 -> `[n]`, the trigger each gets."""
    shown = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return torch.cat([_turn(part.float() / 255) for part in shown.split(1024)]).numpy()


def _turn(images: Tensor) -> Tensor:
    return content_numbers(images, salt=3) % len(TRIGGERS)
