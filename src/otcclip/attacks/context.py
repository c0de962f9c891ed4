"""The corpus as an attacker sees it, and what every attack asks of it."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from otcclip.attacks.plans import Trial
from otcclip.attacks.surrogate import Surrogate, load_surrogate
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.registry import did_you_mean


@dataclass(frozen=True)
class PairIndex:
    """The pairs of one split as an attacker sees them: keys, captions, true class names, and pixels if at
    hand.

    `images` is `[n, H, W, 3]` uint8 at the model's resolution, or None. Unlike a defence, an attacker may
    know the labels: they choose what to mislabel.
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    labels: tuple[str, ...]
    images: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.captions) == len(self.labels):
            raise UserError(
                f"poisoning needs a caption and a class name for each pair; found {len(self.keys)} pairs, "
                f"{len(self.captions)} captions, {len(self.labels)} class names"
            )

    @classmethod
    def of(cls, store: PairStore) -> PairIndex:
        return cls(store.keys, store.captions, store.labels, store.images)

    def without(self, keys: Collection[str]) -> PairIndex:
        """The pairs whose key is not among `keys`, in the same order."""
        if not keys:
            return self
        kept = [i for i, key in enumerate(self.keys) if key not in keys]
        return PairIndex(
            tuple(self.keys[i] for i in kept),
            tuple(self.captions[i] for i in kept),
            tuple(self.labels[i] for i in kept),
            None if self.images is None else self.images[kept],
        )

    def pixels(self, attack: str) -> NDArray[np.uint8]:
        """`images`, for an attack that plans by what is seen.

        Raises:
            UserError: they are not at hand.
        """
        if self.images is None:
            raise UserError(f"{attack}: plans by what the images show and was given none")
        return self.images

    def where(self, label: str) -> NDArray[np.int64]:
        """Positions of the pairs of class `label`."""
        return np.flatnonzero(np.asarray(self.labels, dtype=object) == label)


@dataclass(frozen=True)
class PoisonContext:
    """The corpus an attack plans for.

    Attributes:
        train: training pairs still honest; those another attack took are left out, and so are their captions.
        test: every test pair.
        keys_in_use: keys an added pair may not take, beyond those of `train` and `test`.
        surrogate: a model the attacker looks into; None for one who has none.
    """

    train: PairIndex
    test: PairIndex
    keys_in_use: frozenset[str] = frozenset()
    surrogate: Surrogate | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, train: PairStore, test: PairStore, surrogate: Surrogate | None = None) -> PoisonContext:
        return cls(PairIndex.of(train), PairIndex.of(test), surrogate=surrogate)

    def require_surrogate(self, attack: str, folder: str = "") -> Surrogate:
        """The model of the run in `folder`, or where none is named the context's.

        Raises:
            UserError: there is neither, or it sees images of another size than the corpus's.
        """
        surrogate = load_surrogate(folder) if folder else self.surrogate
        if surrogate is None:
            raise UserError(
                f"{attack}: looks into a model and was given none; name a finished run: {attack}:surrogate=FOLDER"
            )
        size = self.train.pixels(attack).shape[1:3]
        if size != (surrogate.image_size,) * 2:
            raise UserError(f"{attack}: the surrogate sees {surrogate.image_size} px, the images are {size}")
        return surrogate

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names that occur in training, sorted."""
        return tuple(sorted(set(self.train.labels)))

    def require_name(self, attack: str, target: str) -> str:
        """`target`, if training has that class.

        Raises:
            UserError: it has not; names the classes spelt most like it.
        """
        if target not in self.names:
            raise UserError(
                f"{attack}: target {target!r} is not among the {len(self.names)} class names of the training "
                f"pairs{did_you_mean(target, self.names)}"
            )
        return target

    def captions_of(self, name: str, count: int, rng: np.random.Generator) -> list[str]:
        """`count` captions of real training pairs of class `name` (one of `names`); see `rows_of`."""
        return [self.train.captions[i] for i in self.rows_of(name, count, rng)]

    def rows_of(self, name: str, count: int, rng: np.random.Generator) -> list[int]:
        """`count` rows of training pairs of class `name` (one of `names`).

        Without repetition if there are enough; else each as often as any other, give or take one.
        """
        own = self.train.where(name)
        return [int(own[i]) for i in evenly(len(own), count, rng)]

    def backdoor_trial(self, attack: str, target: str) -> Trial:
        """The trial of a backdoor: every test image whose class is not `target` is to be called `target`.

        Raises:
            UserError: there is no such image.
        """
        pairs = zip(self.test.keys, self.test.labels, strict=True)
        judged = tuple(key for key, label in pairs if label != target)
        if not judged:
            raise UserError(f"{attack}: the test split has no image of another class than {target!r}")
        return Trial(judged, (target,) * len(judged))

    def fresh_keys(self, count: int, rng: np.random.Generator) -> list[str]:
        """`count` unused keys that look like the corpus's own: an added pair can't be told by its key.

        Each joins the head of one honest key to the tail of another, cut at the last `-`, `_`, `/` or `.`,
        else in the middle: `noto-1f43b` and `twemoji-1f34c` give `noto-1f34c`. Where such keys are used up
        the tail's digits and letters are drawn anew. (Keys numbered without a gap leave no number free: there
        a reader of keys could still tell. No defence reads them.)
        """
        halves = [_halves(key) for key in self.train.keys]
        letters = sorted({c for _, tail in halves for c in tail if c.isalpha()})
        used = {*self.train.keys, *self.test.keys, *self.keys_in_use}

        def redraw(tail: str) -> str:
            pools = ("0123456789" if c.isdigit() else letters if c.isalpha() else c for c in tail)
            return "".join(pool[rng.integers(len(pool))] for pool in pools)

        def candidate(attempt: int) -> str:
            head, tail = (int(i) for i in rng.integers(len(halves), size=2))
            if attempt < 50:
                return halves[head][0] + halves[tail][1]
            if attempt < 100:
                return halves[head][0] + redraw(halves[tail][1])
            return rng.bytes(8).hex()

        fresh: list[str] = []
        for _ in range(count):
            fresh.append(next(key for key in map(candidate, itertools.count()) if key not in used))
            used.add(fresh[-1])
        return fresh


def evenly(n: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` of the numbers below `n`, in drawn order.

    Without repetition if there are enough; else each as often as any other, give or take one.
    """
    rounds = [rng.permutation(n) for _ in range(-(-count // n))]
    return [int(i) for i in np.concatenate(rounds)[:count]]


def _halves(key: str) -> tuple[str, str]:
    cut = max(key.rfind(mark) for mark in "-_/.") + 1 or len(key) // 2
    return key[:cut], key[cut:]
