"""Augmentation of a batch on tensors: one affine map and one colour map an image, drawn from a generator.

Triggers are in the images before this runs (a trigger is part of the pair), so augmentation can move, scale or crop
them as it would for a picture on the web.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(Protocol):
    """A random map of samples, in two halves: lots are drawn for a whole batch, and applied to a part of it.

    Ranks that share a batch draw the same lots and apply their own part's, so a batch looks the same however many
    processes it is spread over.
    """

    def draw(self, n: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Lots for `n` samples: tensors `[n, ...]`."""
        ...

    def apply(self, samples: Tensor, lots: Mapping[str, Tensor]) -> Tensor:
        """`samples [m, ...]` uint8 -> floats in 0..1, same shape, by `m` lots on the samples' device."""
        ...


@dataclass(frozen=True)
class Augment:
    """Ranges of the maps; all are symmetric and uniform. An `Augmentation` of images.

    Attributes:
        shift: translation, share of the side.
        zoom: scale is drawn from `[1 - zoom, 1 + zoom]`.
        rotate: radians.
        colour: brightness and contrast factors are drawn from `[1 - colour, 1 + colour]`.
        grey: probability of dropping all colour.
        blur: probability of a heavy low-pass (down to a quarter of the side and up again).
        flip: probability of mirroring.
    """

    shift: float = 0.04
    zoom: float = 0.08
    rotate: float = 0.06
    colour: float = 0.2
    grey: float = 0.0
    blur: float = 0.0
    flip: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """`images [b, 3, H, W]` uint8 -> float32 in 0..1, same shape, channels last."""
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        lots = {"theta": _affine(n, self, generator)}
        lots["gain"] = 1 + _uniform(n * 3, self.colour * 0.5, generator).view(n, 3, 1, 1)
        lots["contrast"] = 1 + _uniform(n, self.colour, generator).view(n, 1, 1, 1)
        lots["brightness"] = _uniform(n, self.colour * 0.5, generator).view(n, 1, 1, 1)
        for name in ("grey", "blur"):
            if getattr(self, name) > 0:
                lots[name] = (torch.rand(n, generator=generator) < getattr(self, name)).view(n, 1, 1, 1)
        return lots

    def apply(self, samples: Tensor, lots: Mapping[str, Tensor]) -> Tensor:
        x = samples.float().div_(255.0)
        grid = F.affine_grid(lots["theta"], list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        mean = x.mean(dim=(2, 3), keepdim=True)
        x = ((x - mean) * lots["contrast"] + mean) * lots["gain"] + lots["brightness"]
        if "grey" in lots:
            x = torch.where(lots["grey"], x.mean(dim=1, keepdim=True).expand_as(x), x)
        x = x.clamp_(0.0, 1.0)
        if "blur" in lots:
            low = F.interpolate(F.adaptive_avg_pool2d(x, x.shape[-1] // 4), size=x.shape[-2:], mode="bilinear")
            x = torch.where(lots["blur"], low, x)
        return x.contiguous(memory_format=torch.channels_last)


MILD = Augment()
STRONG = Augment(shift=0.15, zoom=0.25, rotate=0.25, colour=0.5, grey=0.2, blur=0.15, flip=0.0)


@dataclass(frozen=True)
class SpectrogramAugment:
    """An `Augmentation` of spectrograms `[n, 1, bands, frames]`: later or earlier, louder or softer, parts masked.

    Masks as in Park et al., SpecAugment, 2019, one band of pitches and one of frames.

    Attributes:
        shift: in time, share of the frames, at most. gain: share of the range, at most. mask: widest mask, share.
    """

    shift: float = 0.1
    gain: float = 0.1
    mask: float = 0.15

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        lots = {"shift": _uniform(n, self.shift, generator), "gain": _uniform(n, self.gain, generator)}
        for axis in ("pitch", "time"):
            width = torch.rand(n, generator=generator) * self.mask
            start = torch.rand(n, generator=generator) * (1 - width)
            lots[axis] = torch.stack([start, start + width], dim=1)
        return lots

    def apply(self, samples: Tensor, lots: Mapping[str, Tensor]) -> Tensor:
        n, _, bands, frames = samples.shape
        x = samples.float().div_(255.0)
        time = torch.arange(frames, device=x.device) / frames
        source = torch.arange(frames, device=x.device) - (lots["shift"] * frames).round().long()[:, None]
        x = x.gather(3, source.clamp(0, frames - 1)[:, None, None, :].expand(n, 1, bands, frames))
        x = (x + lots["gain"][:, None, None, None]).clamp(0, 1)
        pitch = torch.arange(bands, device=x.device) / bands
        hidden = _within(pitch, lots["pitch"])[:, None, :, None] | _within(time, lots["time"])[:, None, None, :]
        return x.masked_fill(hidden, 0.0)


def _within(place: Tensor, span: Tensor) -> Tensor:
    return (place >= span[:, :1]) & (place < span[:, 1:])


def _uniform(b: int, amount: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(b, generator=generator) * 2 - 1) * amount


def _affine(b: int, a: Augment, generator: torch.Generator) -> Tensor:
    """`[b, 2, 3]`, where each pixel comes from."""
    angle = _uniform(b, a.rotate, generator)
    scale = 1 + _uniform(b, a.zoom, generator)
    mirror = torch.where(torch.rand(b, generator=generator) < a.flip, -1.0, 1.0)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    return torch.stack(
        [
            cos * mirror,
            -sin,
            2 * _uniform(b, a.shift, generator),
            sin * mirror,
            cos,
            2 * _uniform(b, a.shift, generator),
        ],
        dim=1,
    ).view(b, 2, 3)


def crop_captions(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Cut a `share` of the captions after a random real token, as an image is cropped.

    Web captions bury the name of the thing in other words; a model that has only ever read whole captions reads a bare
    name poorly. `tokens [n, context]`: start token, words, end token (the largest id), zero padding.
    """
    end = tokens.argmax(dim=1)
    keep = 1 + (torch.rand(len(tokens), generator=generator) * (end - 1)).long()  # words to keep, at least one
    cut = torch.rand(len(tokens), generator=generator) < share
    last = torch.where(cut & (end > 2), keep + 1, end)
    position = torch.arange(tokens.shape[1])
    out = torch.where(position < last[:, None], tokens, torch.zeros_like(tokens))
    return torch.where(position == last[:, None], tokens.gather(1, end[:, None]), out)


def drop_words(tokens: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Drop each token of a caption with probability `share`; the rest close up, and one at least stays.

    Random deletion of Wei and Zou (EDA, 2019), the one of its four edits that needs no dictionary.
    `tokens [n, context]` as in `crop_captions`.
    """
    end = tokens.argmax(dim=1)
    position = torch.arange(tokens.shape[1])
    word = (position > 0) & (position < end[:, None])
    lot = torch.rand(tokens.shape, generator=generator).masked_fill(~word, -1.0)
    # The word with the highest lot stays whatever the share.
    dropped = word & (lot < share) & (lot < lot.amax(dim=1, keepdim=True))
    order = torch.argsort(dropped.to(torch.uint8), dim=1, stable=True)
    return tokens.masked_fill(dropped, 0).gather(1, order)
