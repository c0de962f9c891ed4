"""One picture, many times: altered copies of it that make like claims are one claim, however they were altered.

Whoever wants one picture called by another name shows it often, moved, turned, scaled, tinted and made noisy until no
two are near-duplicates by their descriptors, under captions that differ in words that say nothing. Each copy is then a
look-alike of the others and says what they say. So copies are looked for where they could matter, among look-alikes
with like captions, as one aligns pictures: over small scales and turns and all shifts, the largest normalised
correlation of what is left without the lowest frequencies (Brown, "A survey of image registration techniques", 1992;
shifts by the Fourier transform, Kuglin and Hines, 1975). Correlation does not mind light and contrast.

Honest pictures have copies too: a set of drawings is drawn over by the next set. What they don't have is many. Who has
more copies than is usual over the corpus is *crowded* (`crowds`): crowded copies don't vote on each other, and each
has made its claim as often as there are copies. What is usual is a quantile over pictures, all copies of one counting
as one, so that an enemy moves it only by as many different pictures.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.evidence.descriptors import blur

SIDE = 32  # pixels at which pictures are laid over each other
SCALES, TURNS = (0.92, 1.0, 1.08), (-0.1, 0.0, 0.1)  # share, radians
SHIFT = 4  # pixels of SIDE, either way
EXPLAINED = 0.5  # share of a picture's variance that its copy explains, at least
LIKE = 0.25  # agreement from which two captions make like claims
CANDIDATES = 48
ALIKE = 0.45  # similarity of descriptors below which nobody looks for a copy
USUAL = 0.99  # quantile over pictures of the number of copies that still counts as usual
FEW = 3  # with fewer candidates than this nobody is crowded, and nothing is laid over anything
CHUNK = 1024
PAIRS = 128  # spectra of these stay in a core's cache: with 2,048 a way to lay them over each other takes twice as long


def crowds(size: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """How often each picture is there, and who is there more often than is usual.

    Args:
        size: number of pictures n. a, b: `[l]` int64, who is whose copy, each pair once.

    Returns:
        `[n]` int64 pictures that show this one, itself included; `[n]` bool, whether they are unusually many.
    """
    shown = torch.bincount(torch.cat([a, b]), minlength=size) + 1
    return shown, shown > usually_shown(shown)


def usually_shown(shown: Tensor) -> int:
    """The most often that a picture is shown and is no crowd, of `shown [n]`, pictures that show each, itself too."""
    ordered = shown.sort().values
    pictures = (1.0 / ordered.double()).cumsum(0)  # a picture shown m times is one picture
    return max(FEW, int(ordered[torch.searchsorted(pictures, USUAL * pictures[-1]).clamp(max=len(shown) - 1)]))


def copies(
    images: Tensor | ImageSource, similarity: Tensor, index: Tensor, caption_of: Tensor, agreement: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs of images that are copies of one picture and make like claims.

    Args:
        images: `[n, c, H, W]` uint8. similarity, index: `[n, k]` look-alikes, near-duplicates among them.
        caption_of: `[n]` int64. agreement: `[u, u]`.

    Returns:
        `a, b`, both `[l]` int64, each pair once and `a < b`.
    """
    a, b = _candidates(similarity, index, caption_of, agreement)
    if not len(a):
        return a, b
    used, place = torch.cat([a, b]).unique(return_inverse=True)
    pictures = torch.cat([small(images[rows]) for rows in used.split(CHUNK)])
    found = laid_over(spectra(pictures), pictures, *place.split(len(a)))
    return a[found], b[found]


def small(images: Tensor) -> Tensor:
    """`images [n, c, H, W]` uint8 as they are laid over each other: `[n, c, SIDE, SIDE]`."""
    return F.adaptive_avg_pool2d(images.float() / 255, SIDE)


def spectra(pictures: Tensor) -> Tensor:
    """`pictures [n, c, SIDE, SIDE]` as others are laid over them: `[n, c, SIDE, SIDE / 2 + 1]` complex64."""
    return torch.cat([_spectrum(x) for x in pictures.split(CHUNK)])


def laid_over(still: Tensor, moving: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether one picture lies on another, which is moved, scaled and turned.

    Args:
        still: `spectra` of those that stay. moving: `[m, c, SIDE, SIDE]`. a: `[l]` int64 into `still`. b: `[l]` into
            `moving`.

    Returns:
        `[l]` bool.
    """
    found = torch.zeros(len(a), dtype=torch.bool)
    for scale, turn in sorted(product(SCALES, TURNS), key=lambda how: (abs(how[0] - 1), abs(how[1]))):
        left = torch.nonzero(~found)[:, 0]  # one way to lay them over each other is enough
        if not len(left):
            break
        used, place = b[left].unique(return_inverse=True)
        of_moving = torch.cat([_spectrum(_turned(moving[rows], scale, turn)) for rows in used.split(CHUNK)])
        for part, at in zip(left.split(PAIRS), place.split(PAIRS), strict=True):
            both = (still[a[part]].conj() * of_moving[at]).sum(dim=1)
            fit = torch.fft.irfft2(both, s=(SIDE, SIDE)).roll((SHIFT, SHIFT), dims=(1, 2))
            found[part] = fit[:, : 2 * SHIFT + 1, : 2 * SHIFT + 1].amax(dim=(1, 2)) >= math.sqrt(EXPLAINED)
    return found


def _candidates(similarity: Tensor, index: Tensor, caption_of: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
    """Look-alikes with like captions, each pair once; only images with enough of them to be crowded."""
    size, k = index.shape
    image = torch.arange(size)[:, None].expand(-1, k)
    row, column = (similarity >= ALIKE).nonzero(as_tuple=True)
    a, b = image[row, column], index[row, column]
    like = agreement[caption_of[a], caption_of[b]] >= LIKE
    code = (torch.minimum(a, b) * size + torch.maximum(a, b))[like].unique()
    a, b = code // size, code % size
    while len(a):
        number = torch.bincount(torch.cat([a, b]), minlength=size)
        enough = (number[a] >= FEW) & (number[b] >= FEW)
        if enough.all():
            break
        a, b = a[enough], b[enough]
    return a, b


def _turned(x: Tensor, scale: float, turn: float) -> Tensor:
    """`x [m, c, SIDE, SIDE]` scaled and turned about its middle, its border carried on."""
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _spectrum(x: Tensor) -> Tensor:
    """Fourier transform of `x` without its low frequencies, of mean 0 and length 1: products are correlations."""
    x = x - blur(x, SIDE * 3 / 32)
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    out: Tensor = torch.fft.rfft2(x / x.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None])
    return out
