"""Training the words in use is training the whole table, but for the rows that nobody looks up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from otcclip.models import TwoTower, create_two_tower
from otcclip.training.words import UsedWords

CAPTIONS = ["a polar bear", "red apple", "apple | red, round", "teapot"]


@pytest.fixture(scope="module")
def start() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0)


def _loss(model: TwoTower, tokens: torch.Tensor) -> torch.Tensor:
    aim = torch.linspace(-1, 1, 128, dtype=torch.float64)
    return (model.text(tokens).pooled.double() @ aim).square().mean()


def _three_steps(model: TwoTower, tokens: torch.Tensor, words: UsedWords | None, decay: float) -> None:
    parameters = [p for name, p in model.named_parameters() if "visual" not in name and "local_head" not in name]
    if words is not None:
        parameters = words.among(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=decay)
    for step in range(3):
        optimizer.zero_grad()
        seen = tokens[step:]  # fewer words each time: moments go on where there is no gradient
        if words is None:
            _loss(model, seen).backward()
        else:
            with words.collected():
                _loss(model, seen).backward()
            words.collect()
        nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimizer.step()
        if words is not None:
            words.put()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_same_steps_as_with_a_dense_gradient(start: TwoTower, decay: float) -> None:
    dense, sparse = copy.deepcopy(start).double(), copy.deepcopy(start).double()
    tokens = dense.tokenize(CAPTIONS)
    words = UsedWords(sparse, tokens)
    _three_steps(dense, tokens, None, decay)
    _three_steps(sparse, tokens, words, decay)
    one, two = dense.state_dict(), sparse.state_dict()
    table = "clip.token_embedding.weight"
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-12) for name in one if name != table)
    used = torch.unique(tokens)
    assert torch.allclose(one[table][used], two[table][used], rtol=0, atol=1e-12)
    assert not torch.allclose(two[table][used], start.state_dict()[table][used].double(), atol=1e-6)
    unused = torch.ones(len(one[table]), dtype=torch.bool).index_fill_(0, used, False)
    assert torch.equal(two[table][unused], start.state_dict()[table][unused].double())
    assert not sparse.clip.token_embedding.sparse, "outside a step the model is as it was"


def test_a_word_that_was_not_announced_is_refused(start: TwoTower) -> None:
    model = copy.deepcopy(start)
    words = UsedWords(model, model.tokenize(["red apple"]))
    with words.collected():
        _loss(model, model.tokenize(["violin"])).backward()
    with pytest.raises(IndexError, match="no training caption uses"):
        words.collect()


def test_take_follows_a_model_that_was_loaded(start: TwoTower) -> None:
    model = copy.deepcopy(start)
    words = UsedWords(model, model.tokenize(CAPTIONS))
    with torch.no_grad():
        model.clip.token_embedding.weight.add_(1.0)
    words.take()
    assert torch.equal(words.weight, model.clip.token_embedding.weight[words.rows])
    assert sum(p is words.weight for p in words.among(list(model.parameters()))) == 1
