"""Targeted data poisoning (TDPA): some particular images come to be called something else.

Carlini and Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022, arXiv 2106.09667, section
3: for a target image x' and an adversarial class y', plant {(x', c) : c in Y'}, where Y' is a set of real
captions of y'. Their experiments poison one image a model; here several distinct images are poisoned at
once, each with a class of its own, so that one run gives a rate.

The test images stay in the test set of every other measure (zero-shot accuracy, backdoor success): they are
excluded from nothing. This attack's own success is measured on exactly these images, untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from otcclip.attacks.base import (
    Addition,
    PoisonContext,
    PoisonPlan,
    PoisonRecord,
    Trial,
    check_positive,
    rng_for,
)
from otcclip.errors import UserError


@dataclass(frozen=True)
class Targeted:
    """`images` test images, each added `copies` times with captions of an adversarial class of its own.

    Attributes:
        images: number of distinct test images, drawn by the seed.
        copies: training pairs an image.
        name: as in records and results; change it to run two of them at once.
    """

    images: int = 16
    copies: int = 15
    name: str = "targeted"

    has_trigger: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self.name, images=self.images, copies=self.copies)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. `trial.wanted`: for each image a training class not its own, each once."""
        rng = rng_for(self.name, seed)
        test = corpus.test
        chosen, wanted = draw_targets(self.name, corpus, self.images, rng)
        keys = iter(corpus.fresh_keys(self.images * self.copies, rng))
        added: list[Addition] = []
        records: list[PoisonRecord] = []
        for i, target in zip(chosen, wanted, strict=True):
            source, own = test.keys[i], test.captions[i]
            for caption in corpus.captions_of(target, self.copies, rng):
                added.append(Addition(next(keys), source, caption))
                records.append(PoisonRecord(added[-1].key, self.name, "", source, target, seed, own))
        return PoisonPlan(
            attack=self.name,
            target="",
            replaced=(),
            added=tuple(added),
            records=tuple(records),
            trial=Trial(tuple(test.keys[i] for i in chosen), wanted),
        )

    def trigger(self, images: Tensor) -> Tensor:
        """The identity: the image itself is the target."""
        return images


def draw_targets(
    attack: str, corpus: PoisonContext, count: int, rng: np.random.Generator
) -> tuple[list[int], tuple[str, ...]]:
    """`count` distinct rows of the test split, and for each a well-known class that is not its own, each class once.

    Raises:
        UserError: fewer test images, or not more class names, than `count`.
    """
    test = corpus.test
    if count > len(test.keys):
        raise UserError(f"{attack}: {count} target images asked for, the test split has {len(test.keys)}")
    chosen = [int(i) for i in rng.choice(len(test.keys), count, replace=False)]
    return chosen, _other_names([test.labels[i] for i in chosen], _well_known(corpus, count), attack, rng)


def _well_known(corpus: PoisonContext, count: int) -> tuple[str, ...]:
    """Classes with at least the median number of training images (all of them where those are too few).

    Who wants a photo called something names a class that the model will know: with two training images it would not
    call even a true image so, and the attack would fail without any defence.
    """
    names, images = np.unique(np.asarray(corpus.train.labels, dtype=object), return_counts=True)
    known = names[images >= np.median(images)]
    return tuple(str(name) for name in (known if len(known) > count else names))


def _other_names(own: list[str], names: tuple[str, ...], attack: str, rng: np.random.Generator) -> tuple[str, ...]:
    """A distinct name for each of `own`, never the own one."""
    if len(names) <= len(own):
        raise UserError(
            f"{attack}: {len(own)} target images need more than {len(own)} class names in training, found {len(names)}"
        )
    pool = [names[i] for i in rng.permutation(len(names))]
    chosen = []
    for name in own:
        # At most one entry of the pool is the own name, and the pool never falls below two.
        chosen.append(pool.pop(0 if pool[0] != name else 1))
    return tuple(chosen)
