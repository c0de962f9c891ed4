"""The transport alignment loss against a softmax over the whole batch."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.defenses.alignment import ot_alignment_loss
from otcclip.evidence.matching import EPSILON, ITERATIONS
from otcclip.models.two_tower import Features
from otcclip.transport import FeatureSets, all_costs

B, U, D = 7, 5, 10
CAPTION = torch.tensor([0, 1, 2, 3, 4, 4, 0])


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def batch() -> tuple[Features, Features]:
    cells, tokens = unit(B, 6, D, seed=1).requires_grad_(), [unit(1 + i % 4, D, seed=5 + i) for i in range(U)]
    sets = FeatureSets.from_list(tokens)
    sets.values.requires_grad_()
    return Features(unit(B, D, seed=0), FeatureSets.from_dense(cells)), Features(unit(U, D, seed=2), sets)


def logits(image: Features, text: Features, temperature: float) -> Tensor:
    return -all_costs(image.local, text.local, epsilon=EPSILON, iterations=ITERATIONS).value / temperature


def test_with_all_negatives_it_is_the_whole_softmax() -> None:
    """Two images of one caption are no negatives of each other: a caption stands once."""
    image, text = batch()
    got = ot_alignment_loss(image, text, CAPTION, negatives=U - 1, temperature=0.1)
    expected = F.cross_entropy(logits(image, text, 0.1), CAPTION)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    inputs = (image.local.values, text.local.values)
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("negatives", [1, 2])
def test_the_hardest_negatives_by_pooled_cosine(negatives: int) -> None:
    image, text = batch()
    got = ot_alignment_loss(image, text, CAPTION, negatives=negatives, temperature=0.2)
    cosine, all_logits, total = image.pooled @ text.pooled.T, logits(image, text, 0.2).detach(), 0.0
    for i, own in enumerate(CAPTION.tolist()):
        others = sorted((c for c in range(U) if c != own), key=lambda c: -float(cosine[i, c]))[:negatives]
        rivals = [math.exp(float(all_logits[i, c])) for c in (own, *others)]
        total -= math.log(rivals[0] / sum(rivals))
    assert float(got.detach()) == pytest.approx(total / B, rel=1e-4)


def test_gradient_reaches_every_set() -> None:
    image, text = batch()
    cells, tokens = torch.autograd.grad(
        ot_alignment_loss(image, text, CAPTION, negatives=7, temperature=0.1), (image.local.values, text.local.values)
    )
    assert (cells.view(B, 6, D).abs().amax((1, 2)) > 0).all()
    offsets = text.local.offsets.tolist()
    assert all(tokens[a:b].abs().max() > 0 for a, b in pairwise(offsets))


def test_one_caption_leaves_nothing_to_tell_apart() -> None:
    image, text = batch()
    alone = Features(text.pooled[:1], text.local.take([0]))
    got = ot_alignment_loss(image, alone, torch.zeros(B, dtype=torch.int64), negatives=7, temperature=0.1)
    assert float(got.detach()) == pytest.approx(0, abs=1e-6)
