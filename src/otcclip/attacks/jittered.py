"""Jittered (adaptive): a targeted attack whose copies no longer count as copies.

METHOD section 5. Carlini and Terzis (ICLR 2022, arXiv 2106.09667, section 3) plant one image many times; the evidence
lets near-duplicates neither vote on each other nor repeat a claim. So each copy is moved, scaled, turned, tinted and
made noisy until it is no near-duplicate of another by the defence's own descriptor, and each has a caption of its
own that names the adversarial class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from otcclip.attacks.base import Addition, PoisonContext, PoisonPlan, PoisonRecord, Trial, check_positive, rng_for
from otcclip.attacks.look_alikes import twins_among
from otcclip.attacks.targeted import draw_targets
from otcclip.attacks.wording import paraphrases
from otcclip.errors import UserError

ROUNDS = 10
STRONGER = 1.25
HONEST_SAMPLE = 512  # images that the descriptor's mean is estimated on
# Ranges at strength 1: share of the side, share, radians, share of the light, noise's standard deviation.
SHIFT, ZOOM, TURN, TINT, NOISE = 0.04, 0.06, 0.08, 0.1, 0.01


@dataclass(frozen=True)
class Jittered:
    """`images` test images, each added as `copies` different pictures of it, with captions of an adversarial class.

    Attributes:
        images: number of distinct test images, drawn by the seed.
        copies: training pairs an image.
        strength: how far a copy is from the image at first; 1 is a little more than the trainer's own augmentation.
            Copies still too alike are drawn anew, stronger each time.
        name: as in records and results.
    """

    images: int = 16
    copies: int = 15
    strength: float = 1.0
    name: str = "jittered"

    has_trigger: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self.name, images=self.images, copies=self.copies)
        if not 0 < self.strength < np.inf:
            raise UserError(f"{self.name}: strength is above 0, got {self.strength}")

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        """See `Attack.plan`. `trial.wanted`: for each image a training class not its own, each once."""
        rng, test = rng_for(self.name, seed), corpus.test
        chosen, wanted = draw_targets(self.name, corpus, self.images, rng)
        keys = corpus.fresh_keys(self.images * self.copies, rng)
        source = np.repeat(np.array(chosen), self.copies)
        honest = corpus.train.pixels(self.name)
        some = honest[np.sort(rng.choice(len(honest), min(HONEST_SAMPLE, len(honest)), replace=False))]
        shown = self._copies(test.pixels(self.name)[source], source, some, int(rng.integers(2**31)))
        said = [c for name in wanted for c in paraphrases(name, corpus.train.captions, self.copies, rng)]
        asked = [name for name in wanted for _ in range(self.copies)]
        added = tuple(
            Addition(key, test.keys[i], caption, image)
            for key, i, caption, image in zip(keys, source, said, shown, strict=True)
        )
        records = tuple(
            PoisonRecord(key, self.name, "", test.keys[i], name, seed, test.captions[i])
            for key, i, name in zip(keys, source, asked, strict=True)
        )
        return PoisonPlan(self.name, "", (), added, records, Trial(tuple(test.keys[i] for i in chosen), wanted))

    def _copies(
        self, originals: NDArray[np.uint8], source: NDArray[np.int64], honest: NDArray[np.uint8], seed: int
    ) -> NDArray[np.uint8]:
        """Jittered `originals`, no two of one `source` near-duplicates (or as far as `ROUNDS` tries got)."""
        generator = torch.Generator().manual_seed(seed)
        shown = originals.copy()
        again = np.ones(len(shown), bool)
        strength = self.strength
        for _ in range(ROUNDS):
            shown[again] = jitter(originals[again], strength, generator)
            again = twins_among(shown, source, honest)
            if not again.any():
                break
            strength *= STRONGER
        return shown

    def trigger(self, images: Tensor) -> Tensor:
        """The identity: the image itself is the target."""
        return images


def jitter(images: NDArray[np.uint8], strength: float, generator: torch.Generator) -> NDArray[np.uint8]:
    """`images [n, H, W, 3]` uint8, each moved, scaled, turned, tinted and made noisy; at strength 0 unchanged."""
    n = len(images)
    draw = (torch.rand(7, n, generator=generator) * 2 - 1) * strength
    angle, scale = TURN * draw[0], 1 + ZOOM * draw[1]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # affine_grid measures the image from -1 to 1: a share of the side counts double.
    theta = torch.stack([cos, -sin, 2 * SHIFT * draw[2], sin, cos, 2 * SHIFT * draw[3]], dim=1).view(n, 2, 3)
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    x = F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    x = x * (1 + TINT * draw[4:].T[:, :, None, None])
    x = x + NOISE * strength * torch.randn(x.shape, generator=generator)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
