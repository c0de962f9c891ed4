"""The nouns of a corpus: `Pair`, as it comes from disk, and `PairStore`, decoded and held in memory.

A pair's `key` is stable across shuffles, runs and machines, so whatever is known about a pair (trust, a match, a
poison record) is kept by key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pair:
    """One image-caption pair as read: encoded image bytes, caption, optional label and metadata.

    Attributes:
        metadata: the json member's scalar fields as strings, without the label.
        fields: the json member itself, numbers, lists and objects as they came; empty where the reader was not asked
            for it. `write_shard` writes it back under what `metadata` and `label` say.
    """

    key: str
    image: bytes
    caption: str
    label: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairStore:
    """Decoded pairs of one split, resized to the model's input size.

    Attributes:
        keys: `n` stable, unique keys.
        images: `[n, H, W, 3]` uint8, RGB; may be a memory map.
        captions: `n` captions, as the corpus gives them.
        labels: `n` class names for evaluation only; a defence never sees them (`training` strips them). Empty when
            the corpus has none.
        sources: `n` names of the hand a pair came from (an emoji style, a shard); empty when unknown.
    """

    keys: tuple[str, ...]
    images: NDArray[np.uint8]
    captions: tuple[str, ...]
    labels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.keys)
        if self.images.ndim != 4 or self.images.shape[-1] != 3 or self.images.dtype != np.uint8:
            raise ValueError(f"images: expected [n, H, W, 3] uint8, got {self.images.shape} {self.images.dtype}")
        if len(set(self.keys)) != n:
            raise ValueError("keys: not unique")
        for name, size in (
            ("images", len(self.images)),
            ("captions", len(self.captions)),
            ("labels", len(self.labels) or n),
            ("sources", len(self.sources) or n),
        ):
            if size != n:
                raise ValueError(f"{name}: expected {n} entries as in keys, got {size}")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def image_size(self) -> int:
        return int(self.images.shape[1])

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> PairStore:
        """The pairs at `index`, in that order."""
        idx = np.asarray(index, dtype=np.int64)

        def pick(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[i] for i in idx) if values else ()

        return PairStore(pick(self.keys), self.images[idx], pick(self.captions), pick(self.labels), pick(self.sources))

    def without_labels(self) -> PairStore:
        """What a defence may see: images, captions and keys."""
        return replace(self, labels=(), sources=())


def concatenate(stores: Iterable[PairStore]) -> PairStore:
    """Stores one after another; labels and sources survive only where every store has them."""
    parts = list(stores)

    def join(name: str) -> tuple[str, ...]:
        columns = [getattr(part, name) for part in parts]
        return tuple(v for column in columns for v in column) if all(columns) else ()

    return PairStore(
        join("keys"),
        np.concatenate([part.images for part in parts]),
        join("captions"),
        join("labels"),
        join("sources"),
    )
