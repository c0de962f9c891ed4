"""Perceptual hashes: copies lie close, strangers far."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct

from otcclip.curation.phash import phash


def smooth(n: int, size: int = 96) -> torch.Tensor:
    draw = torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(draw, size=(size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a ^ b)


def test_resized_and_noisy_copies_are_close_and_strangers_far() -> None:
    images = smooth(40)
    hashes = phash(images)
    small = F.interpolate(images.float(), size=(48, 48), mode="bilinear", antialias=True).round().to(torch.uint8)
    assert np.median(differ(hashes, phash(small))) <= 2
    noise = torch.randint(-3, 4, images.shape, generator=torch.Generator().manual_seed(1))
    assert np.median(differ(hashes, phash((images.int() + noise).clamp(0, 255).to(torch.uint8)))) <= 2
    far = differ(hashes[:, None], hashes[None])[~np.eye(40, dtype=bool)]
    assert far.min() > 8 and 24 < far.mean() < 38


def test_by_hand() -> None:
    image = smooth(1, 32)
    grey = (image[0].double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).numpy()
    low = dct(dct(grey, axis=0, norm="ortho"), axis=1, norm="ortho")[:8, :8].ravel()[1:]
    low = np.where(np.abs(low) < 1, 0, low)
    expected = sum(1 << i for i, value in enumerate(low) if value > np.median(low))
    assert int(phash(image)[0]) == expected


def test_one_colour_hashes_to_nothing() -> None:
    assert (phash(torch.full((2, 3, 40, 40), 77, dtype=torch.uint8)) == 0).all()
