"""One picture, many times: altered copies of it that make like claims are one claim, however they were altered.

Whoever wants one picture called by another name shows it often, moved, turned, scaled, tinted and made noisy until no
two are near-duplicates by their descriptors, under captions that differ in words that say nothing. Each copy is then a
look-alike of the others and says what they say. So copies are looked for where they could matter, among look-alikes
with like captions, as one aligns pictures: over small scales and turns and all shifts, the largest normalised
correlation of what is left without the lowest frequencies (Brown, "A survey of image registration techniques", 1992;
shifts by the Fourier transform, Kuglin and Hines, 1975). Correlation does not mind light and contrast.

Where a picture goes on beyond its border, what a shift brings in at one side the other copy has not: its middle is
found in the other all the same (`lies_on`; a template, windows' lengths by running means, Lewis, "Fast normalized
cross-correlation", 1995). Looked for among all pictures that finds many drawings which have a circle in the middle, so
it is asked only about pictures that are many copies already.

Honest pictures have copies too: a set of drawings is drawn over by the next set. What they don't have is many:
`evidence.crowds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.evidence.captions import LIKE
from otcclip.evidence.descriptors import blur

SIDE = 32  # pixels at which pictures are laid over each other
SCALES, TURNS = (0.92, 1.0, 1.08), (-0.1, 0.0, 0.1)  # share, radians
SHIFT = 4  # pixels of SIDE, either way; the middle is what such a shift leaves inside
MIDDLE = SIDE - 2 * SHIFT
EXPLAINED = 0.5  # share of a picture's variance that its copy explains, at least
CANDIDATES = 48
ALIKE = 0.45  # similarity of descriptors below which nobody looks for a copy
FEW = 3  # with fewer candidates than this nobody is crowded, and nothing is laid over anything
CHUNK = 1024
PAIRS = 128  # spectra of these stay in a core's cache: with 2,048 a way to lay them over each other takes twice as long


def copies(
    images: Tensor | ImageSource, similarity: Tensor, index: Tensor, caption_of: Tensor, agreement: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of images that look alike and make like claims, and which are copies of one picture.

    Args:
        images: `[n, c, H, W]` uint8. similarity, index: `[n, k]` look-alikes, near-duplicates among them.
        caption_of: `[n]` int64. agreement: `[u, u]`.

    Returns:
        `a, b`, both `[l]` int64, each pair once and `a < b`; `[l]` bool, whether one lies on the other.
    """
    a, b = _candidates(similarity, index, caption_of, agreement)
    return a, b, laid(lambda pictures, one, other: laid_over(spectra(pictures), pictures, one, other), images, a, b)


def laid(lie: Callable[[Tensor, Tensor, Tensor], Tensor], images: Tensor | ImageSource, a: Tensor, b: Tensor) -> Tensor:
    """`[l]` bool: which of the pairs `a, b [l]` of `images [n, c, H, W]` `lie` on each other (`lies_on`)."""
    if not len(a):
        return torch.zeros(0, dtype=torch.bool)
    used, place = torch.cat([a, b]).unique(return_inverse=True)
    return lie(torch.cat([small(images[rows]) for rows in used.split(CHUNK)]), *place.split(len(a)))


def once(a: Tensor, b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The pairs `a, b [l]` of `size` images, each once and `a < b`."""
    code = (torch.minimum(a, b) * size + torch.maximum(a, b)).unique()
    return code // size, code % size


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

    def fit(rows: Tensor, spectrum: Tensor) -> Tensor:
        return _at_each_shift((still[a[rows]].conj() * spectrum).sum(dim=1)).amax(dim=(1, 2))

    return _any_way(moving, b, lambda x: (_spectrum(x),), fit)


def lies_on(pictures: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`[l]` bool: whether of the `pictures [m, c, SIDE, SIDE]` `a [l]` lies on `b [l]`, whole or with its middle."""
    found = laid_over(spectra(pictures), pictures, a, b)
    rest = torch.nonzero(~found)[:, 0]
    found[rest] = lies_by_its_middle(pictures, a[rest], b[rest])
    return found


def lies_by_its_middle(pictures: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`lies_on` where it is known that `a` does not lie whole on `b`."""
    middles = torch.cat([_middle(x) for x in pictures.split(CHUNK)])

    def fit(rows: Tensor, spectrum: Tensor, length: Tensor) -> Tensor:
        return (_at_each_shift((middles[a[rows]].conj() * spectrum).sum(dim=1)) / length).amax(dim=(1, 2))

    return _any_way(pictures, b, _under_a_middle, fit)


def _any_way(
    moving: Tensor, b: Tensor, made: Callable[[Tensor], tuple[Tensor, ...]], fit: Callable[..., Tensor]
) -> Tensor:
    """`[l]` bool: whether in some scale and turn a picture `moving[b]` fits, by its largest correlation.

    Args:
        made: what is needed of pictures that are scaled and turned. fit: the largest correlation of each of some rows
            of `b [l]`, by these rows and what was made of their pictures.
    """
    found = torch.zeros(len(b), dtype=torch.bool)
    for scale, turn in sorted(product(SCALES, TURNS), key=lambda how: (abs(how[0] - 1), abs(how[1]))):
        left = torch.nonzero(~found)[:, 0]  # one way to lay them over each other is enough
        if not len(left):
            break
        used, place = b[left].unique(return_inverse=True)
        parts = [made(_turned(moving[rows], scale, turn)) for rows in used.split(CHUNK)]
        ready = [torch.cat(part) for part in zip(*parts, strict=True)]
        for part, at in zip(left.split(PAIRS), place.split(PAIRS), strict=True):
            found[part] = fit(part, *(of_all[at] for of_all in ready)) >= math.sqrt(EXPLAINED)
    return found


def _candidates(similarity: Tensor, index: Tensor, caption_of: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
    """Look-alikes with like captions, each pair once; only images with enough of them to be crowded."""
    size, k = index.shape
    image = torch.arange(size)[:, None].expand(-1, k)
    row, column = (similarity >= ALIKE).nonzero(as_tuple=True)
    a, b = image[row, column], index[row, column]
    like = agreement[caption_of[a], caption_of[b]] >= LIKE
    a, b = once(a[like], b[like], size)
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
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), [1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


def _spectrum(x: Tensor) -> Tensor:
    """Fourier transform of `x` without its low frequencies, of mean 0 and length 1: products are correlations."""
    out: Tensor = torch.fft.rfft2(_unit(_without_low(x)))
    return out


def _middle(x: Tensor) -> Tensor:
    """The same of the middle of `x` with nothing around it."""
    middle = _unit(_without_low(x)[..., SHIFT:-SHIFT, SHIFT:-SHIFT])
    out: Tensor = torch.fft.rfft2(F.pad(middle, (SHIFT,) * 4))
    return out


def _under_a_middle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fourier transform of `x [m, c, SIDE, SIDE]` as it is, and `[m, 2 SHIFT + 1, 2 SHIFT + 1]` how far what lies under
    another's middle goes from its mean at each shift."""
    x = _without_low(x)
    size = x.shape[1] * MIDDLE**2
    total, squares = (_window_means(y.mean(dim=1, keepdim=True))[:, 0] * size for y in (x, x.square()))
    return torch.fft.rfft2(x), (squares - total.square() / size).clamp_min(1e-8).sqrt()


def _window_means(x: Tensor) -> Tensor:
    out: Tensor = F.avg_pool2d(F.avg_pool2d(x, (MIDDLE, 1), 1), (1, MIDDLE), 1)  # in one go it is twelve times the work
    return out


def _at_each_shift(products: Tensor) -> Tensor:
    """`[..., 2 SHIFT + 1, 2 SHIFT + 1]` correlations at shifts of -SHIFT to SHIFT, of products of spectra."""
    everywhere: Tensor = torch.fft.irfft2(products, s=(SIDE, SIDE))
    return everywhere.roll((SHIFT, SHIFT), dims=(-2, -1))[..., : 2 * SHIFT + 1, : 2 * SHIFT + 1]


def _without_low(x: Tensor) -> Tensor:
    return x - blur(x, SIDE * 3 / 32)


def _unit(x: Tensor) -> Tensor:
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    out: Tensor = x / x.flatten(1).norm(dim=1).clamp_min(1e-6)[:, None, None, None]
    return out
