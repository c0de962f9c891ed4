"""Perceptual hashes: 64 bits that hardly change when an image is resized or recompressed.

Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1 (the DCT hash):
grey, 32 x 32, DCT, the 8 x 8 lowest frequencies but the constant, each above or below their median.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import dctn
from torch import Tensor

SIDE, LOW = 32, 8


def phash(images: Tensor) -> NDArray[np.uint64]:
    """`images [n, 3, H, W]` uint8 -> `[n]` uint64. An image of one colour hashes to 0."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    grey = (images.float() * weights).sum(dim=1, keepdim=True)
    small = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True)[:, 0].numpy()
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :LOW, :LOW].reshape(len(small), -1)
    low = low[:, 1:]
    # Rounding leaves noise where nothing is: what is below a grey level in all of the image is taken for nothing.
    low = np.where(np.abs(low) < 1.0, 0.0, low)
    bits = low > np.median(low, axis=1, keepdims=True)
    place = np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64)
    out: NDArray[np.uint64] = (bits * place).sum(axis=1, dtype=np.uint64)
    return out
