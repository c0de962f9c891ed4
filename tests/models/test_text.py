"""The text tower without its padding, against open_clip's own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from otcclip.models import TwoTower, create_two_tower
from otcclip.models.text import GROUPS, MIN_GROUP, text_states

WORDS = ("a", "photo", "of", "the", "polar bear", "banana", "ice cream", "alarm clock", "on a table", "rain")


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=1).eval()


def ragged(n: int) -> list[str]:
    """`n` captions of 0 to 40 words in no order of length; the longest do not fit the context of 32."""
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=rng.choice((0, 1, 2, 5, 9, 20, 40)))) for _ in range(n)]
    assert "" in captions
    return captions


def reference(model: TwoTower, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """open_clip's `encode_text`, and every position's state as it leaves `ln_final`, projected."""
    seen: list[Tensor] = []
    hook = model.clip.ln_final.register_forward_hook(lambda _, __, out: seen.append(out))
    pooled = model.clip.encode_text(tokens)
    hook.remove()
    return pooled, seen[0] @ model.clip.text_projection


@pytest.mark.parametrize("n", [1, 7, MIN_GROUP * GROUPS + 5])
@torch.no_grad()
def test_equals_open_clip(model: TwoTower, n: int) -> None:
    tokens = model.tokenize(ragged(max(n, 20))[-n:])
    pooled, states = reference(model, tokens)
    got = text_states(model.clip, tokens)
    torch.testing.assert_close(got.pooled, pooled, atol=1e-5, rtol=1e-4)
    end = tokens.argmax(1).tolist()
    assert len(got.offsets) == n + 1 and len(got.tokens) == got.offsets[-1]
    for i in range(n):
        mine = got.tokens[got.offsets[i] : got.offsets[i + 1]]
        # Words only: no start token, no end token, no padding; where there is no word, the end token's state.
        expected = states[i, 1 : end[i]] if end[i] > 1 else pooled[i][None]
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_caption_means_the_same_in_any_company(model: TwoTower) -> None:
    captions = ragged(MIN_GROUP * GROUPS)
    together = text_states(model.clip, model.tokenize(captions))
    for i in (0, 17, 95):
        alone = text_states(model.clip, model.tokenize([captions[i]]))
        torch.testing.assert_close(alone.pooled[0], together.pooled[i], atol=1e-5, rtol=1e-4)
        rows = together.tokens[together.offsets[i] : together.offsets[i + 1]]
        torch.testing.assert_close(alone.tokens, rows, atol=1e-5, rtol=1e-4)


def test_gradient_equals_open_clips() -> None:
    model = create_two_tower("otcclip-tiny", seed=2)
    tokens = model.tokenize(ragged(MIN_GROUP * GROUPS))
    weights = torch.randn(len(tokens), 128, generator=torch.Generator().manual_seed(0))
    (text_states(model.clip, tokens).pooled * weights).sum().backward()
    named = [(name, p) for name, p in model.clip.named_parameters() if p.grad is not None]
    assert {"token_embedding.weight", "positional_embedding", "text_projection"} <= {name for name, _ in named}
    mine = [p.grad for _, p in named]
    theirs = torch.autograd.grad((model.clip.encode_text(tokens) * weights).sum(), [p for _, p in named])
    for (name, _), one, other in zip(named, mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_text_of_the_two_tower_is_unit_and_ragged(model: TwoTower) -> None:
    features = model.text(model.tokenize(["", "banana", "a big red apple"]))
    assert features.local.sizes.tolist()[:2] == [1, 1] and features.local.sizes[2] >= 4
    features.local.validate()
    torch.testing.assert_close(features.pooled.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features.local[0][0], features.pooled[0])
