"""Altered copies of a picture are found, and other pictures are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcclip.attacks.jittered import jitter
from otcclip.evidence.copies import (
    FEW,
    MIDDLE,
    SHIFT,
    SIDE,
    _at_each_shift,
    _candidates,
    _middle,
    _spectrum,
    _under_a_middle,
    _without_low,
    copies,
    laid_over,
    lies_on,
    small,
    spectra,
)

COPIES = 8


@pytest.fixture(scope="module")
def pictures(make_store) -> Tensor:  # type: ignore[no-untyped-def]
    """Six pictures, each in eight altered versions one after the other, `[48, 3, 64, 64]`."""
    images = np.repeat(make_store(6, 6).images, COPIES, axis=0)
    altered = jitter(images, 1.0, torch.Generator().manual_seed(0))
    return torch.from_numpy(altered).permute(0, 3, 1, 2)


def everybody(size: int) -> tuple[Tensor, Tensor]:
    """Similarities and look-alikes where everyone is asked about everyone else."""
    index = torch.stack([torch.tensor([j for j in range(size) if j != i]) for i in range(size)])
    return torch.ones(index.shape), index


def found(images: Tensor, caption_of: Tensor, agreement: Tensor) -> set[tuple[int, int]]:
    a, b, lie = copies(images, *everybody(len(images)), caption_of, agreement)
    assert (a < b).all()
    a, b = a[lie], b[lie]
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def test_altered_copies_are_found_and_other_pictures_are_not(pictures: Tensor) -> None:
    got = found(pictures, torch.zeros(len(pictures), dtype=torch.int64), torch.ones(1, 1))
    same = {(i, j) for i in range(len(pictures)) for j in range(i + 1, len(pictures)) if i // COPIES == j // COPIES}
    assert len(got & same) >= 0.9 * len(same)
    assert not got - same


def test_copies_that_claim_other_things_are_not_looked_for(pictures: Tensor) -> None:
    caption_of = torch.arange(len(pictures)) % COPIES
    assert not found(pictures, caption_of, torch.eye(COPIES))


@given(st.integers(-3, 3), st.integers(-3, 3), st.floats(0.5, 1.0), st.floats(0.0, 0.2))
@settings(max_examples=25, deadline=None)
def test_neither_place_nor_light_nor_contrast_hides_a_copy(
    down: int, right: int, contrast: float, light: float
) -> None:
    generator = torch.Generator().manual_seed(down * 7 + right)
    inner = torch.rand(3, SIDE - 12, SIDE - 12, generator=generator)
    images = torch.full((FEW + 1, 3, SIDE, SIDE), 0.5)
    images[:, :, 6:-6, 6:-6] = inner
    images[1] = images[1].roll((down, right), dims=(1, 2)) * contrast + light * (1 - contrast)
    size = len(images)
    _, _, lie = copies(
        (images * 255).to(torch.uint8), *everybody(size), torch.zeros(size, dtype=torch.int64), torch.ones(1, 1)
    )
    assert lie.sum() == size * (size - 1) // 2


def test_a_product_of_spectra_is_the_correlation_at_every_shift() -> None:
    x = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).double()
    spectrum = _spectrum(x)
    by_fft = torch.fft.irfft2((spectrum[:1].conj() * spectrum[1:]).sum(dim=1), s=(SIDE, SIDE))[0]
    plain = torch.fft.irfft2(spectrum, s=(SIDE, SIDE))
    torch.testing.assert_close(plain.flatten(1).norm(dim=1), torch.ones(2).double())
    for down, right in ((0, 0), (2, 5), (-1, 3)):
        slow = (plain[0].roll((down, right), dims=(1, 2)) * plain[1]).sum()
        torch.testing.assert_close(by_fft[down % SIDE, right % SIDE], slow)


def test_only_who_could_be_crowded_is_looked_at() -> None:
    """A chain: nobody has `FEW` like neighbours once those with fewer are gone."""
    size = 6
    index = torch.tensor([[(i + 1) % size, (i - 1) % size] for i in range(size)])
    a, b = _candidates(torch.ones(size, 2), index, torch.zeros(size, dtype=torch.int64), torch.ones(1, 1))
    assert len(a) == len(b) == 0
    assert all(
        len(part) == 0
        for part in copies(
            torch.zeros(size, 3, 8, 8, dtype=torch.uint8),
            torch.ones(size, 2),
            index,
            torch.zeros(size, dtype=torch.int64),
            torch.ones(1, 1),
        )
    )


def test_a_picture_that_goes_on_beyond_its_border_is_found_by_its_middle() -> None:
    """Two windows of one large picture, four pixels apart: what the one has at one side the other has not."""
    large = torch.rand(1, 3, SIDE + 8, SIDE + 8, generator=torch.Generator().manual_seed(4))
    large = F.avg_pool2d(large, 3, 1, 1)
    shared = torch.zeros(SIDE + 8, SIDE + 8)
    shared[SHIFT:SIDE, SHIFT:SIDE] = 1
    large = torch.where(shared > 0, large, (large - 0.5) * 4 + 0.5)  # and that is what most of it shows
    other = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    pictures = torch.cat([large[..., :SIDE, :SIDE], large[..., SHIFT : SIDE + SHIFT, SHIFT : SIDE + SHIFT], other])
    a, b = torch.tensor([0, 1, 0, 2]), torch.tensor([1, 0, 2, 1])
    assert not laid_over(spectra(pictures), pictures, a, b).any()
    assert lies_on(pictures, a, b).tolist() == [True, True, False, False]
    far = torch.cat([pictures[:1], large[..., 8:, 8:]])
    assert not lies_on(far, a[:1], b[:1]).any(), "farther than SHIFT is not looked for"


def test_who_lies_on_another_whole_lies_on_it(pictures: Tensor) -> None:
    asked = small(pictures)
    index = torch.arange(len(asked))
    a, b = (part.flatten() for part in torch.meshgrid(index, index, indexing="ij"))
    whole, either = laid_over(spectra(asked), asked, a, b), lies_on(asked, a, b)
    assert (either >= whole).all()
    assert not either[a // COPIES != b // COPIES].any()


def test_a_middle_and_what_lies_under_it_give_a_correlation() -> None:
    """By loops: the middle of one against each window of the other, both without mean and of length 1."""
    one, other = torch.rand(2, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6)).double()
    spectrum, length = _under_a_middle(other)
    got = _at_each_shift((_middle(one).conj() * spectrum).sum(dim=1)) / length
    left = _without_low(one)[0, :, SHIFT:-SHIFT, SHIFT:-SHIFT]
    right = _without_low(other)[0]
    for down in range(2 * SHIFT + 1):
        for across in range(2 * SHIFT + 1):
            window = right[:, down : down + MIDDLE, across : across + MIDDLE]
            slow = torch.corrcoef(torch.stack([left.flatten(), window.flatten()]))[0, 1]
            torch.testing.assert_close(got[0, down, across], slow, atol=1e-6, rtol=1e-6)
