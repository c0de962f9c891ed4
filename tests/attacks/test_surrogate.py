"""White-box attacks: the distance by its definition, the nearest caption by brute force, a patch that is optimised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip.attacks import (
    BadCLIP,
    BadNets,
    LowOT,
    ModelSurrogate,
    PoisonContext,
    apply_trigger,
    distances,
    load_surrogate,
    make_plans,
)
from otcclip.attacks.base import rng_for
from otcclip.attacks.wording import words
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.evidence.matching import EPSILON, ITERATIONS
from otcclip.models import Features, create_two_tower, save_open_clip
from otcclip.transport import FeatureSets, pair_costs

MakeStore = Callable[..., PairStore]


@pytest.fixture(scope="module")
def train(make_store: MakeStore) -> PairStore:
    return make_store(96, 8, own_caption=True)


@pytest.fixture(scope="module")
def test(make_store: MakeStore) -> PairStore:
    store = make_store(24, 8, seed=1)
    return PairStore(tuple(f"test-{k}" for k in store.keys), store.images, store.captions, store.labels)


@pytest.fixture(scope="module")
def surrogate() -> ModelSurrogate:
    return ModelSurrogate(create_two_tower("otcclip-tiny", seed=0))


class Palette:
    """A surrogate whose best patch is known: an image is its mean colour from grey, a caption a colour of its own."""

    image_size = 64

    def see(self, images: torch.Tensor) -> Features:
        return self._features(F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2) - 0.5)

    def read(self, captions: Sequence[str]) -> Features:
        colours = [(1.0, 1.0, -1.0) if "banana" in c else (math.sin(len(c)), math.cos(len(c)), 1.0) for c in captions]
        return self._features(torch.tensor(colours)[:, None])

    def _features(self, sets: torch.Tensor) -> Features:
        unit = F.normalize(sets, dim=-1)
        return Features(F.normalize(sets.mean(1), dim=-1), FeatureSets.from_dense(unit))


def floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_distance_is_half_cosine_half_transport(train: PairStore, surrogate: ModelSurrogate) -> None:
    captions = list(train.captions[:3])
    d = distances(surrogate, floats(train.images[:4]), captions)
    seen, read = surrogate.see(floats(train.images[:4])), surrogate.read(captions)
    assert d.shape == (4, 3)
    for i in range(4):
        for c in range(3):
            one, other = seen.local.take(torch.tensor([i])), read.local.take(torch.tensor([c]))
            ot = pair_costs(one, other, epsilon=EPSILON, iterations=ITERATIONS).value[0]
            wanted = 0.5 * (1 - seen.pooled[i] @ read.pooled[c]) + 0.5 * ot
            torch.testing.assert_close(d[i, c], wanted, atol=1e-4, rtol=0)


def test_a_surrogate_is_frozen_but_shows_gradients_to_pixels(surrogate: ModelSurrogate) -> None:
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    surrogate.see(image).pooled.sum().backward()
    assert image.grad is not None and image.grad.abs().max() > 0
    assert not any(p.requires_grad for p in surrogate.model.parameters()) and not surrogate.model.training


def test_low_ot_writes_the_nearest_caption_under_the_nearest_images(train: PairStore, test: PairStore) -> None:
    attack = LowOT("violin", count=5, choice=1000, templates=12)
    corpus = PoisonContext.of(train, test, Palette())
    plan = attack.plan(corpus, 0)
    draws = rng_for("low-ot", 0)
    others = [i for i, label in enumerate(train.labels) if label != "violin"]
    others = draws.choice(others, len(others), replace=False)
    captions = attack.candidates(corpus, draws)
    d = distances(Palette(), floats(apply_trigger(BadNets("violin"), train.images[others])), captions)
    reached = {train.keys[i]: float(row.min()) for i, row in zip(others, d, strict=True)}
    chosen = {change.key: change.caption for change in plan.replaced}
    assert sorted(reached[key] for key in chosen) == sorted(reached.values())[:5]
    at = {train.keys[i]: row for i, row in zip(others, d, strict=True)}
    assert all(float(at[key][captions.index(caption)]) == reached[key] for key, caption in chosen.items())
    assert max(reached.values()) > min(reached.values()) + 0.05 and len(set(chosen.values())) > 1


def test_low_ot_chooses_among_captions_that_name_the_target(train: PairStore, test: PairStore) -> None:
    foreign = replace(train, captions=("a red apple and a banana", *train.captions[1:]))
    captions = LowOT("banana", templates=12).candidates(PoisonContext.of(foreign, test), np.random.default_rng(0))
    own = {c for c, label in zip(train.captions, train.labels, strict=True) if label == "banana"}
    assert own | {"a red apple and a banana"} <= set(captions) and len(captions) == len(set(captions))
    assert all("banana" in words(c) for c in captions) and len(captions) > len(own) + 1


def test_an_attack_that_needs_a_model_says_so(train: PairStore, test: PairStore, surrogate: ModelSurrogate) -> None:
    with pytest.raises(UserError, match=r"low-ot: looks into a model and was given none; .*low-ot:surrogate=FOLDER"):
        make_plans(train, test, [LowOT("banana", count=2)], 0)
    small = [
        PairStore(s.keys, np.ascontiguousarray(s.images[:, ::2, ::2]), s.captions, s.labels) for s in (train, test)
    ]
    with pytest.raises(UserError, match=r"low-ot: the surrogate sees 64 px, the images are \(32, 32\)"):
        make_plans(small[0], small[1], [LowOT("banana", count=2)], 0, surrogate)
    with pytest.raises(UserError, match=r"surrogate 'nowhere': expected the folder of a finished run"):
        make_plans(train, test, [LowOT("banana", count=2, surrogate="nowhere")], 0)


def test_a_finished_run_is_a_surrogate(surrogate: ModelSurrogate, tmp_path: Path) -> None:
    save_open_clip(surrogate.model, tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps({"model": "otcclip-tiny"}))
    image = torch.rand(2, 3, 64, 64)
    same = load_surrogate(str(tmp_path)).see(image)
    torch.testing.assert_close(same.pooled, surrogate.see(image).pooled)
    torch.testing.assert_close(same.local.values, surrogate.see(image).local.values)


def test_the_optimised_patch_is_the_best_there_is(train: PairStore, test: PairStore, tmp_path: Path) -> None:
    corpus = PoisonContext.of(train, test, Palette())
    attack = BadCLIP.optimise("banana", corpus, tmp_path / "patch.npy", steps=80, batch=16, pull=0)
    # The mean colour is pulled towards (1, 1, -1): pure yellow, in every pixel.
    wanted = np.broadcast_to(np.array([1, 1, 0], np.float32)[:, None, None], (3, 12, 12))
    np.testing.assert_allclose(np.load(attack.patch), wanted, atol=0.05)


def test_images_of_the_target_pull_too(train: PairStore, test: PairStore, tmp_path: Path) -> None:
    blue = train.images.copy()
    blue[[i for i, name in enumerate(train.labels) if name == "banana"]] = (0, 0, 255)
    corpus = PoisonContext.of(replace(train, images=blue), test, Palette())
    attack = BadCLIP.optimise("banana", corpus, tmp_path / "patch.npy", steps=80, batch=16, pull=1000)
    assert np.load(attack.patch).mean(axis=(1, 2)) == pytest.approx([0, 0, 1], abs=0.1)


def test_a_patch_is_the_same_in_every_process_and_named_in_the_records(
    train: PairStore, test: PairStore, surrogate: ModelSurrogate, tmp_path: Path
) -> None:
    corpus = PoisonContext.of(train, test, surrogate)
    one, again, other = (
        BadCLIP.optimise("banana", corpus, tmp_path / f"{i}.npy", seed=seed, steps=2, batch=8)
        for i, seed in enumerate((0, 0, 1))
    )
    assert np.array_equal(np.load(one.patch), np.load(again.patch))
    elsewhere = BadCLIP("banana", patch=str(tmp_path / "0.npy"))
    assert np.array_equal(apply_trigger(elsewhere, test.images), apply_trigger(one, test.images))
    plans = [make_plans(train, test, [BadCLIP("banana", a.patch, count=3)], 0)[0] for a in (one, other)]
    assert plans[0].records[0].trigger != plans[1].records[0].trigger


def test_the_patch_is_laid_as_it_is_and_scales(tmp_path: Path) -> None:
    patch = np.random.default_rng(0).random((3, 12, 12), np.float32)
    np.save(tmp_path / "p.npy", patch)
    attack = BadCLIP("x", str(tmp_path / "p.npy"))
    shown = attack.trigger(torch.full((3, 64, 64), 0.5))
    assert np.array_equal(shown[:, 48:60, 48:60].numpy(), patch)  # 4 px of margin
    assert int((shown != 0.5).sum()) == 3 * 144
    large = attack.trigger(torch.full((3, 128, 128), 0.5))
    assert int((large != 0.5).any(0).sum()) == 24 * 24
    # A file written anew is read anew.
    np.save(tmp_path / "p.npy", np.zeros_like(patch))
    assert attack.trigger(torch.full((3, 64, 64), 0.5))[:, 48:60, 48:60].abs().max() == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 4, 5)), r"expected \[3, s, s\], got \(3, 4, 5\)"),
        (np.full((3, 4, 4), 2.0), "values outside 0..1"),
        (np.full((3, 4, 4), np.nan), "values outside 0..1"),
        (b"not numpy", "not a .npy file of numbers"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_patch_is_one_line(content: np.ndarray | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match=message):
        BadCLIP("x", str(path))


def test_badclip_without_a_patch_says_how_to_make_one(train: PairStore, test: PairStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"badclip: needs patch=FILE.npy, made by recipes/badclip_patch.py"):
        BadCLIP("banana")
    with pytest.raises(UserError, match="badclip: looks into a model"):
        BadCLIP.optimise("banana", PoisonContext.of(train, test), tmp_path / "p.npy")
    assert not (tmp_path / "p.npy").exists()
