"""The judge on a model whose every answer is known."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from otcclip.attacks import BadNets, LabelSwap, PoisonPlan, Targeted, Trial, make_plans
from otcclip.attacks.plans import Addition
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.models.two_tower import Features
from otcclip.training.judge import Judge, png
from otcclip.transport import FeatureSets

NAMES = tuple("abcdefgh")


class Reader(nn.Module):
    """Reads an image's class off its brightness, except that
    * it calls every `c` an `h`;
    * under a patch (the lower right corner is not flat) it calls `a`, `b` and `d` "e"."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.logit_scale = torch.tensor(20.0)
        self.modes: list[bool] = []

    def tokenize(self, captions: list[str]) -> Tensor:
        return torch.tensor([[NAMES.index(caption)] for caption in captions])

    def image(self, images: Tensor) -> Features:
        self.modes.append(self.training)
        seen = (images[:, 0, 0, 0] * 255 / 20).round().long()
        said = torch.where(seen == 2, 7, seen)
        patched = images[..., -4:, -4:].flatten(1).std(1) > 0.1
        return features(torch.where(patched & (seen < 4) & (seen != 2), 4, said))

    def text(self, tokens: Tensor) -> Features:
        return features(tokens[:, 0])


def features(classes: Tensor) -> Features:
    pooled = F.one_hot(classes, len(NAMES)).float()
    return Features(pooled, FeatureSets.from_dense(pooled[:, None]))


@pytest.fixture(scope="module")
def held_out() -> PairStore:
    """Four pictures of each class, all as bright as their class says."""
    kind = np.arange(32) % 8
    images = np.broadcast_to((kind * 20).astype(np.uint8)[:, None, None, None], (32, 16, 16, 3)).copy()
    labels = tuple(NAMES[k] for k in kind)
    return PairStore(tuple(f"k{i}" for i in range(32)), images, labels, labels, ("s",) * 32)


def plan_of(attack: str, wanted: dict[str, str], target: str = "") -> PoisonPlan:
    return PoisonPlan(attack, target, (), (), (), Trial(tuple(wanted), tuple(wanted.values())))


def test_rates(held_out: PairStore) -> None:
    badnets, targeted = BadNets("e"), Targeted()
    (backdoor,) = make_plans(held_out, held_out, [BadNets("e", count=4)], 0)
    # Of four targets the model is taken in by one: k2 is a `c`, which it calls `h`.
    aimed = plan_of("targeted", {"k0": "b", "k2": "h", "k3": "a", "k12": "f"})
    model = Reader().train()
    found = Judge(held_out, NAMES, [badnets, targeted], [backdoor, aimed]).evaluate(model)
    assert found["top1"] == pytest.approx(28 / 32)
    assert found["top5"] <= 1 and found["top5"] >= found["top1"]
    assert list(found["attacks"]) == ["badnets", "targeted"]
    # 28 pictures are no `e`; under the patch a, b and d are called so.
    assert found["attacks"]["badnets"]["n"] == 28
    assert found["attacks"]["badnets"]["asr"] == pytest.approx(12 / 28)
    assert found["attacks"]["targeted"]["n"] == 4
    assert found["attacks"]["targeted"]["asr"] == pytest.approx(1 / 4)
    for rate in found["attacks"].values():
        assert 0 <= rate["low"] < rate["asr"] < rate["high"] <= 1
    assert not any(model.modes) and model.training, "judged in evaluation mode, and handed back as it came"


def test_accuracy_leaves_out_images_that_an_attack_adds_to_training(held_out: PairStore) -> None:
    added = tuple(Addition(f"new{i}", f"k{i}", "b") for i in (2, 2, 5, 99))  # a `c`, twice, an `f`; one of training
    aimed = replace(plan_of("targeted", {"k2": "b", "k5": "b"}), added=added)
    judge = Judge(held_out, NAMES, [Targeted()], [aimed])
    assert [held_out.keys[i] for i in np.flatnonzero(~judge.unseen)] == ["k2", "k5"]
    found = judge.evaluate(Reader())
    assert found["top1"] == pytest.approx(27 / 30), "three `c` of 30 are left, and called `h`"
    assert found["attacks"]["targeted"]["n"] == 2


def test_an_attack_that_trains_on_all_of_the_test_is_one_line(held_out: PairStore) -> None:
    added = tuple(Addition(f"new{i}", f"k{i}", "b") for i in range(32))
    with pytest.raises(UserError, match="all 32 test images"):
        Judge(held_out, NAMES, [Targeted()], [replace(plan_of("targeted", {"k2": "b"}), added=added)])


def test_gallery(held_out: PairStore) -> None:
    (backdoor,) = make_plans(held_out, held_out, [BadNets("e", count=4)], 0)
    aimed = plan_of("targeted", {"k2": "h", "k0": "b"})
    judge = Judge(held_out, NAMES, [BadNets("e"), Targeted()], [backdoor, aimed])
    rows = judge.gallery(Reader(), seed=3)
    assert [row["attack"] for row in rows] == ["badnets"] * 28 + ["targeted"] * 2
    row_of = {key: i for i, key in enumerate(held_out.keys)}
    for row in rows:
        i = row_of[row["key"]]
        clean, shown = (np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("clean_image", "image"))
        assert np.array_equal(clean, held_out.images[i])
        assert np.array_equal(shown, clean) is (row["attack"] == "targeted")
        true = held_out.labels[i]
        assert row["true_name"] == true and row["clean_prediction"] == ("h" if true == "c" else true)
        fooled = row["attack"] == "badnets" and true in "abd"
        assert row["prediction"] == ("e" if fooled else row["clean_prediction"])
        assert row["confidence"] > 0.99
    assert {row["target"] for row in rows if row["attack"] == "badnets"} == {"e"}
    assert {row["key"]: row["target"] for row in rows if row["attack"] == "targeted"} == {"k2": "h", "k0": "b"}


def test_gallery_is_a_seeded_sample(held_out: PairStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otcclip.training.judge.GALLERY", 9)
    (backdoor,) = make_plans(held_out, held_out, [BadNets("e", count=4)], 0)
    judge = Judge(held_out, NAMES, [BadNets("e")], [backdoor])
    one, two, other = ([row["key"] for row in judge.gallery(Reader(), seed)] for seed in (0, 0, 1))
    assert len(one) == 9 == len(set(one)) and one == two and one != other


def test_png_is_lossless() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image)


def test_a_label_swap_is_judged_by_retrieval_too(held_out: PairStore) -> None:
    """The model calls every `c` an `h`: asked for an `h` it brings up a `c` first; asked for any other, never."""
    swap = plan_of("label-swap", {"k2": "h", "k10": "h"})
    aimed = plan_of("targeted", {"k0": "b"})
    found = Judge(held_out, NAMES, [LabelSwap(), Targeted()], [swap, aimed]).evaluate(Reader())["attacks"]
    assert found["label-swap"]["asr"] == 1.0 and "retrieval" not in found["targeted"]
    swapped, random = (found["label-swap"]["retrieval"][name] for name in ("swapped", "random"))
    # Four `c` and four `h` lie on the name `h`; the wrong ones go first at the same score.
    assert swapped == {"hit_at_1": 0.0, "hit_at_5": 1.0, "hit_at_10": 1.0, "n": 1, "min_rank": 5.0}
    assert random["hit_at_10"] == 0.0 and random["min_rank"] > 10
