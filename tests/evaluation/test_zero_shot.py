"""Zero-shot classification by brute force, and class embeddings against open_clip's."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.evaluation import class_embeddings, zero_shot


def features(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), classes=st.integers(1, 12), seed=st.integers(0, 1000), batch=st.integers(1, 40))
def test_is_the_sorted_list_of_similarities(n: int, classes: int, seed: int, batch: int) -> None:
    images, texts = features(n, seed=seed), features(classes, seed=seed + 1)
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    got = zero_shot(images, texts, labels, batch=batch)
    top1 = top5 = 0
    for i in range(n):
        scores = [float(F.cosine_similarity(images[i], text, dim=0)) for text in texts]
        order = sorted(range(classes), key=lambda c: -scores[c])
        assert got.predictions[i] == order[0]
        assert got.ranks[i] == order.index(int(labels[i]))
        top1 += order[0] == labels[i]
        top5 += int(labels[i]) in order[:5]
    assert (got.top1, got.top5, got.n) == (pytest.approx(top1 / n), pytest.approx(top5 / n), n)
    assert got.rate(5).value == got.top5 and got.rate().value == got.top1


def test_equal_similarities_go_to_the_first_class() -> None:
    same = torch.tensor([[1.0, 0.0]] * 7)
    got = zero_shot(torch.tensor([[1.0, 0.0]] * 7), same, range(7))
    assert got.predictions.tolist() == [0] * 7
    assert got.ranks.tolist() == list(range(7))
    assert (got.top1, got.top5) == (pytest.approx(1 / 7), pytest.approx(5 / 7))


def test_right_and_rank_nought_are_the_same() -> None:
    labels = np.arange(200) % 9
    got = zero_shot(features(200), features(9, seed=1), labels)
    assert np.array_equal(got.predictions == labels, got.ranks == 0)


def test_confidence_is_the_softmax_share_of_the_prediction() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    got = zero_shot(torch.tensor([[3.0, 4.0]]), texts, [0], logit_scale=10.0)
    assert got.predictions.tolist() == [1]
    assert got.confidence[0] == pytest.approx(1 / (1 + np.exp(10 * (0.6 - 0.8))), rel=1e-5)


def test_lengths_of_features_do_not_matter() -> None:
    images, texts, labels = features(20), features(5, seed=1), np.arange(20) % 5
    scaled = zero_shot(images * 7, texts * torch.arange(1, 6)[:, None], labels)
    assert np.array_equal(scaled.predictions, zero_shot(images, texts, labels).predictions)


@pytest.mark.parametrize(
    ("images", "texts", "labels", "message"),
    [
        (features(3), features(4), [0, 1], "labels"),
        (features(3), features(4, d=5), [0, 1, 2], "classes"),
        (features(3), features(4), [0, 1, 4], "0..3"),
        (features(3), features(4), [0, 1, -1], "0..3"),
        (features(0), features(4), np.array([], dtype=np.int64), "0..3"),
        (torch.full((3, 6), torch.nan), features(4), [0, 1, 2], "not finite"),
        (features(3), torch.full((4, 6), torch.inf), [0, 1, 2], "not finite"),
    ],
)
def test_refuses_what_can_not_be_judged(images, texts, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot(images, texts, labels)


class Towers(torch.nn.Module):
    """A text tower that counts characters: `encode_text` as open_clip's model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = features(256, 8, seed=3)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        out = self.table[tokens].cumsum(1)[:, -1] + tokens.float().std(1, keepdim=True)
        return F.normalize(out, dim=-1) if normalize else out


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode().ljust(40))[:40] for text in texts])


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_class_embeddings_are_open_clips(batch: int) -> None:
    names, templates = ["polar bear", "banana", "cat {x}"], ["{}", "a photo of a {}.", "art of {}"]
    tower = Towers()
    got = class_embeddings(lambda texts: tower.encode_text(tokenize(texts)), names, templates, batch=batch)
    theirs = open_clip.build_zero_shot_classifier(tower, tokenize, names, templates)
    torch.testing.assert_close(got, theirs.T)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3))


def test_the_default_prompt_is_the_name_itself() -> None:
    seen: list[str] = []

    def encode(texts: list[str]) -> torch.Tensor:
        seen.extend(texts)
        return features(len(texts))

    class_embeddings(encode, ["polar bear", "{}"])
    assert seen == ["polar bear", "{}"]
    class_embeddings(encode, ["{0}"], ["a {} in {braces}"])
    assert seen[2:] == ["a {0} in {braces}"]


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["a"], []), (["a"], ["a photo"])])
def test_refuses_prompts_without_names(names: list[str], templates: list[str]) -> None:
    with pytest.raises(ValueError, match="templates"):
        class_embeddings(lambda texts: features(len(texts)), names, templates)
