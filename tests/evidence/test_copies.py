"""Altered copies of a picture are found, other pictures are not, and only those that are too many count as a crowd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from otcclip.attacks.jittered import jitter
from otcclip.evidence.copies import FEW, SIDE, _candidates, _spectrum, copies, crowds
from otcclip.evidence.neighbours import neighbour_evidence

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
    a, b = copies(images, *everybody(len(images)), caption_of, agreement)
    assert (a < b).all()
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
    a, _ = copies(
        (images * 255).to(torch.uint8), *everybody(size), torch.zeros(size, dtype=torch.int64), torch.ones(1, 1)
    )
    assert len(a) == size * (size - 1) // 2


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


def clique(start: int, size: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(start, start + size) for j in range(i + 1, start + size)]


def ends(links: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(links, dtype=torch.int64).view(-1, 2)
    return both[:, 0], both[:, 1]


def test_a_crowd_is_more_than_is_usual_and_all_copies_are_one_picture() -> None:
    """600 pictures of their own, 20 pairs of twins and one picture 200 times, a quarter of all images."""
    links = [link for t in range(20) for link in clique(600 + 2 * t, 2)] + clique(640, 200)
    shown, crowded = crowds(840, *ends(links))
    assert shown[:600].eq(1).all() and shown[600:640].eq(2).all() and shown[640:].eq(200).all()
    assert crowded.tolist() == [False] * 640 + [True] * 200


@pytest.mark.parametrize("often", [2, FEW, FEW + 1])
def test_a_few_copies_are_no_crowd(often: int) -> None:
    _, crowded = crowds(1000 + often, *ends(clique(1000, often)))
    assert bool(crowded.any()) == (often > FEW)


def test_what_everybody_does_is_usual() -> None:
    links = [link for t in range(50) for link in clique(6 * t, 6)]
    assert not crowds(300, *ends(links))[1].any()


def test_no_copies_at_all() -> None:
    none = torch.empty(0, dtype=torch.int64)
    shown, crowded = crowds(5, none, none)
    assert shown.eq(1).all() and not crowded.any()


def test_a_crowd_does_not_vouch_for_itself(make_store) -> None:  # type: ignore[no-untyped-def]
    """Twelve altered copies of one picture under captions that name another thing, beside two images each of 128."""
    honest = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(4)])
    altered = jitter(np.repeat(honest[:1], 12, axis=0), 1.0, torch.Generator().manual_seed(1))
    images = torch.from_numpy(np.concatenate([honest, altered])).permute(0, 3, 1, 2)
    said = [row // 64 * 32 + row % 32 for row in range(256)] + [1] * 12
    tokens = torch.tensor([[1000, 1 + name, 500 + row % 7, 2000, 0] for row, name in enumerate(said)])
    distinct, caption_of = tokens.unique(dim=0, return_inverse=True)
    evidence = neighbour_evidence(images, distinct, caption_of)
    assert (evidence.copies[256:] >= 6).all() and (evidence.copies[:256] <= 4).all()
    assert torch.isin(evidence.votes[256:], torch.arange(256, 268)).float().mean() < 0.1
    assert evidence.own[256:].min() > 0.1 > evidence.own[:256].median()


def test_a_crowd_has_one_vote_on_others(make_store) -> None:  # type: ignore[no-untyped-def]
    """What twelve copies of one picture weigh for an image that is none of them is what one picture weighs."""
    honest = np.concatenate([make_store(64, 32, seed=seed).images for seed in range(4)])
    altered = jitter(np.repeat(honest[:1], 12, axis=0), 1.0, torch.Generator().manual_seed(1))
    images = torch.from_numpy(np.concatenate([honest, altered])).permute(0, 3, 1, 2)
    said = [row // 64 * 32 + row % 32 for row in range(256)] + [128] * 12
    tokens = torch.tensor([[1000, 1 + name, 500 + row, 2000, 0] for row, name in enumerate(said)])  # all different
    evidence = neighbour_evidence(images, tokens, torch.arange(268))
    assert evidence.crowded[256:].all()
    other = torch.nonzero(~evidence.crowded)[:, 0]
    weight, votes = evidence.weight[0][other], evidence.votes[other]
    of_copies = (weight * evidence.crowded[votes]).sum(dim=1)
    # Before it is split among copies, all votes on an image weigh 1 at most.
    assert (of_copies <= 1 / evidence.copies[256:].min() + 1e-6).all()
    assert of_copies.max() > 0, "copies vote on others"
