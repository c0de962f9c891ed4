"""What a detector sees, and what it is: a score a pair, higher = more suspicious.

Every detector compares with a *fixed reference set*, so that a pair's score does not depend on the shard it stands in
or on the order of the shards. A pair that is itself in the reference never counts as its own neighbour: self is found
by key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from otcclip.detectors.agreement import CaptionAgreement
from otcclip.models.two_tower import Features

Scores = NDArray[np.float64]
ROWS = 1024
T = TypeVar("T")


@dataclass(frozen=True)
class Neighbours:
    """`k` nearest pairs of the reference, nearest first, self left out: `distance [n, k]` (Euclidean), `index [n,
    k]`."""

    distance: Tensor
    index: Tensor


@dataclass(frozen=True)
class PairFeatures:
    """`n` pairs as a detector sees them; no label, and nothing that tells poison from honest pairs.

    Attributes:
        keys, captions: one a pair.
        image, text: unit vectors, pooled (float32) and local (may be float16, as on disk); row i belongs to pair i.
        joint: whether image and text vectors share a space, so that a cosine between them means something.
        local: whether local vectors are comparable with each other likewise (patches with tokens).
        sha256: hex digests of the image files. phash: `[n]` uint64, perceptual hashes.
        pictures: `[n, 3, H, W]` uint8, the images small, for witnesses that look at pixels; None where they were not
            kept, and then nobody looks.
        reference: the fixed pairs to compare with; these pairs themselves where None.
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    image: Features
    text: Features
    sha256: tuple[str, ...]
    phash: NDArray[np.uint64]
    pictures: Tensor | None = None
    joint: bool = True
    local: bool = True
    reference: PairFeatures | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(self.keys), len(self.captions), len(self.image.pooled), len(self.text.pooled)}
        sizes |= {len(self.image.local), len(self.text.local), len(self.sha256), len(self.phash)}
        sizes |= set() if self.pictures is None else {len(self.pictures)}
        if len(sizes) != 1:
            raise ValueError(f"pair features: fields of different lengths {sorted(sizes)}")
        if (self.pictures is None) != (self.against.pictures is None):
            raise ValueError("pair features: pictures both of the pairs and of their reference, or of neither")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def against(self) -> PairFeatures:
        """The reference set."""
        return self if self.reference is None else self.reference

    @cached_property
    def self_index(self) -> Tensor:
        """`[n]` int64: where each pair stands in the reference, -1 if it does not."""
        if self.reference is None:
            return torch.arange(len(self))
        place = self.reference.place
        return torch.tensor([place.get(key, -1) for key in self.keys], dtype=torch.int64)

    @cached_property
    def record_index(self) -> Tensor:
        """`[n]` int64: `self_index` where the pair carries its caption of there; -1 too for one that was changed since,
        which stands in the reference as another pair."""
        same = torch.from_numpy(self.against.kinds[1])[self.self_index] == self.kind_there
        return torch.where(same, self.self_index, -1)

    @cached_property
    def place(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.keys)}

    @cached_property
    def kinds(self) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The distinct captions, sorted, and `[n]` which of them each pair carries."""
        distinct = tuple(sorted(set(self.captions)))
        place = {caption: i for i, caption in enumerate(distinct)}
        return distinct, np.array([place[caption] for caption in self.captions], np.int64)

    @cached_property
    def kind_there(self) -> Tensor:
        """`[n]` int64: which of the reference's distinct captions each pair carries, -1 for none of them."""
        place = {caption: i for i, caption in enumerate(self.against.kinds[0])}
        return torch.tensor([place.get(caption, -1) for caption in self.captions], dtype=torch.int64)

    @cached_property
    def agreement(self) -> CaptionAgreement:
        """How alike captions are, with token weights counted over the reference's distinct captions."""
        return CaptionAgreement(self.kinds[0]) if self.reference is None else self.reference.agreement

    @cached_property
    def words(self) -> sparse.csr_array:
        """`[n, v]` the captions' words, weighed as in the reference."""
        return self.agreement.marginals(self.captions)

    def take(self, rows: Tensor) -> PairFeatures:
        """The pairs at `rows`, compared with the same reference."""
        index = rows.tolist()
        return PairFeatures(
            tuple(self.keys[i] for i in index),
            tuple(self.captions[i] for i in index),
            Features(self.image.pooled[rows], self.image.local.take(rows)),
            Features(self.text.pooled[rows], self.text.local.take(rows)),
            tuple(self.sha256[i] for i in index),
            self.phash[rows.numpy()],
            None if self.pictures is None else self.pictures[rows],
            self.joint,
            self.local,
            self.against,
        )

    def neighbours(self, k: int) -> Neighbours:
        """The `k` nearest images of the reference by pooled vector; fewer where the reference is smaller."""

        def search() -> Neighbours:
            known = self.known(lambda there: there.neighbours(k), take_rows)
            return known or nearest_images(self.image.pooled, self.against.image.pooled, self.self_index, k)

        return self.once(f"nearest {k}", search)

    def known(self, of: Callable[[PairFeatures], T], take: Callable[[T, Tensor], T]) -> T | None:
        """`of(reference)` at the places of these pairs where all of them are in it, so that nothing is done twice."""
        if self.reference is None or not bool((self.record_index >= 0).all()):
            return None
        return take(of(self.reference), self.record_index)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """`make()`, kept under `name`: what several detectors read is computed once."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: T = self._kept[name]
        return kept

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return {}


def take_rows(result: T, rows: Tensor) -> T:
    """A dataclass of tensors with one row a pair, at `rows`."""
    return type(result)(*(getattr(result, f.name)[rows] for f in fields(result)))  # type: ignore[arg-type]


def nearest_images(queries: Tensor, pool: Tensor, own: Tensor, k: int) -> Neighbours:
    """Blocked exact search among unit vectors: `queries [n, d]`, `pool [m, d]`.

    `own [n]` is the place in the pool that is left out for each query, or -1.
    """
    k = max(1, min(k, len(pool) - 1))
    distances, indices = [], []
    for start in range(0, len(queries), ROWS):
        rows, place = queries[start : start + ROWS], own[start : start + ROWS]
        cosine = rows @ pool.T
        inside = torch.nonzero(place >= 0)[:, 0]
        cosine[inside, place[inside]] = -torch.inf
        index = cosine.topk(k, dim=1).indices
        # 2 - 2 cos cancels catastrophically for near copies; the difference itself does not.
        distances.append((rows[:, None] - pool[index]).norm(dim=-1))
        indices.append(index)
    distance, index = torch.cat(distances), torch.cat(indices)
    order = distance.argsort(dim=1, stable=True)
    return Neighbours(distance.gather(1, order), index.gather(1, order))


@runtime_checkable
class Detector(Protocol):
    """One way of telling which pairs lie.

    Attributes:
        name: as in the registry and in columns (`<name>_score`, dashes made underscores).
        comparable: whether scores mean the same on another data set under the same encoder.
        needs: "joint" (an encoder with image and text in one space), "local" (patches and tokens too), "pictures".
    """

    name: ClassVar[str]
    comparable: ClassVar[bool]
    needs: ClassVar[tuple[str, ...]]

    def score(self, features: PairFeatures) -> Scores:
        """`[n]` float64, finite, higher = more suspicious; row i depends on pair i and the reference alone."""
        ...


def applies(detector: type[Detector] | Detector, features: PairFeatures) -> bool:
    """Whether `features` have what the detector needs."""
    offered = {"joint": features.joint, "local": features.joint and features.local}
    offered["pictures"] = features.pictures is not None
    return all(offered[need] for need in detector.needs)


def as_scores(values: Tensor | NDArray[np.floating]) -> Scores:
    """As `[n]` float64 on the CPU."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(array, np.float64)
