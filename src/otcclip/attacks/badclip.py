"""BadCLIP: a patch whose pixels are optimised until it looks like the target to a model.

Liang, Zhu, Liu, Wu, Cao, Chang, "BadCLIP: Dual-Embedding Guided Backdoor Attack on Multimodal Contrastive Learning",
CVPR 2024, arXiv 2311.12075: the patch pulls triggered images towards the target's texts (against other texts) and
towards images of the target, so that little has to be learned from the poison. Ours is that in its plain form,

    L = CE over texts(g(x + patch), target) + pull (1 - g(x + patch) . mean g(images of the target)),

without their push away from the image's own class. They optimise against a pre-trained model and then poison its
fine-tuning; here a surrogate is trained on the corpus first and the poison goes into training from scratch.

    attack = BadCLIP.optimise("banana", corpus, "runs/badclip/banana.npy")     # PoisonContext with a surrogate; minutes
    make("badclip", target="banana", patch="runs/badclip/banana.npy")          # the same trigger in any other process

The patch is a file because a trigger has to be one function at training and at test, in every process of a run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.attacks.backdoor import backdoor_plan
from otcclip.attacks.badnets import MARGIN
from otcclip.attacks.base import PoisonContext, PoisonPlan, check_positive, rng_for
from otcclip.attacks.surrogate import Surrogate
from otcclip.data.atomic import atomic_file
from otcclip.errors import UserError

TEXTS = 256  # other captions the target's is told from
SCALE = 50.0  # inverse temperature of that choice
STEP = 0.02  # Adam's, in units of a pixel's range


@dataclass(frozen=True)
class BadCLIP:
    """`count` training pairs of other classes get the optimised patch and a real caption of class `target`.

    Attributes:
        target: class name the patch shall mean.
        patch: `.npy` file that `optimise` wrote, `[3, s, s]` float32 in 0..1.
        count: pairs to poison.
        size: side of the patch over the shorter side of the image; it lies at the bottom right.
        name: as in records and results.
    """

    target: str
    patch: str = ""
    count: int = 90
    size: float = 3 / 16
    name: str = "badclip"

    has_trigger: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self.name, count=self.count)
        if not 0 < self.size <= 1:
            raise UserError(f"{self.name}: size is a fraction of the image's side in (0, 1], got {self.size}")
        if not self.patch:
            raise UserError(f"{self.name}: needs patch=FILE.npy, made by recipes/badclip_patch.py")
        _load(self.patch)

    @classmethod
    def optimise(
        cls,
        target: str,
        corpus: PoisonContext,
        path: str | Path,
        *,
        seed: int = 0,
        steps: int = 200,
        batch: int = 64,
        pull: float = 1.0,
        size: float = 3 / 16,
    ) -> BadCLIP:
        """Optimise a patch against the corpus's surrogate, write it to `path`, and return the attack that lays it.

        Args:
            target: class name. seed: draws the patch's first pixels, the images and the texts.
            steps: gradient steps on `batch` images of other classes each.
            pull: weight of the target's images beside its texts.
            size: as the attribute.

        Raises:
            UserError: a target not in the corpus, no surrogate, or a file that cannot be written.
        """
        corpus.require_name(cls.name, target)
        check_positive(cls.name, steps=steps, batch=batch)
        surrogate = corpus.require_surrogate(cls.name)
        pixels = _optimise(target, corpus, surrogate, rng_for(f"{cls.name} patch", seed), steps, batch, pull, size)
        with atomic_file(path) as handle:
            np.save(handle, pixels)
        return cls(target, str(path), size=size)

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. The trial is every test image of another class than the target."""
        digest = hashlib.sha256(_load(self.patch).tobytes()).hexdigest()[:12]
        words = f"optimised patch {digest}, {self.size:g} of the side"
        return backdoor_plan(self, corpus, seed, pattern=words, location="bottom-right")

    def trigger(self, images: Tensor) -> Tensor:
        """`images` `[..., 3, H, W]` in 0..1 with the patch laid over; see `Attack.trigger`."""
        return _lay(images, torch.from_numpy(_load(self.patch)).to(images), self.size)


def _lay(images: Tensor, patch: Tensor, size: float) -> Tensor:
    """`patch [3, s, s]` drawn to `size` of the images' shorter side, at the bottom right within the margin."""
    height, width = images.shape[-2:]
    side = max(1, round(size * min(height, width)))
    if patch.shape[-1] != side:
        patch = F.interpolate(patch[None], size=(side, side), mode="bilinear", antialias=True)[0].clamp(0, 1)
    margin = min(round(MARGIN * min(height, width)), (height - side) // 2, (width - side) // 2)
    out = images.clone()
    bottom, right = height - margin, width - margin
    out[..., bottom - side : bottom, right - side : right] = patch
    return out


def _optimise(
    target: str,
    corpus: PoisonContext,
    surrogate: Surrogate,
    rng: np.random.Generator,
    steps: int,
    batch: int,
    pull: float,
    size: float,
) -> np.ndarray:
    train = corpus.train
    pixels = train.pixels("badclip")
    own = train.where(target)
    others = np.flatnonzero(np.asarray(train.labels, dtype=object) != target)
    foreign = sorted({train.captions[i] for i in others} - {train.captions[i] for i in own})
    texts = [foreign[i] for i in rng.permutation(len(foreign))[:TEXTS]]
    said = sorted({train.captions[i] for i in own})
    with torch.no_grad():
        want_text = F.normalize(surrogate.read([target, *said]).pooled.mean(0), dim=0)
        want_image = F.normalize(surrogate.see(_floats(pixels[own])).pooled.mean(0), dim=0)
        choice = torch.cat([want_text[None], surrogate.read(texts).pooled])
    side = max(1, round(size * min(pixels.shape[1:3])))
    patch = torch.from_numpy(rng.random((3, side, side), dtype=np.float32)).requires_grad_(True)
    optimiser = torch.optim.Adam([patch], lr=STEP)
    for _ in range(steps):
        rows = rng.choice(others, min(batch, len(others)), replace=False)
        seen = surrogate.see(_lay(_floats(pixels[rows]), patch, size)).pooled
        first = torch.zeros(len(rows), dtype=torch.int64)
        loss = F.cross_entropy(SCALE * seen @ choice.T, first) + pull * (1 - seen @ want_image).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return patch.detach().numpy()


def _floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _load(path: str) -> np.ndarray:
    """The patch in `path`, read once for every version of the file."""
    try:
        return _read(path, Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"badclip: patch {path!r}: cannot be read ({error.strerror or error})") from None


@lru_cache(maxsize=16)
def _read(path: str, version: int) -> np.ndarray:
    try:
        patch = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"badclip: patch {path!r}: not a .npy file of numbers ({error})") from None
    if not isinstance(patch, np.ndarray) or patch.ndim != 3 or len(patch) != 3 or patch.shape[1] != patch.shape[2]:
        raise UserError(f"badclip: patch {path!r}: expected [3, s, s], got {getattr(patch, 'shape', type(patch))}")
    patch = patch.astype(np.float32)
    if not (np.isfinite(patch).all() and patch.min() >= 0 and patch.max() <= 1):
        raise UserError(f"badclip: patch {path!r}: values outside 0..1")
    return patch
