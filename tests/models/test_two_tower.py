"""Pooled vectors and local sets of three towers, against open_clip's own pieces (random weights)."""

from __future__ import annotations

from collections.abc import Iterator

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower, open_clip_model_size

CELLS = {"otcclip-tiny": 16, "RN50": 49, "ViT-B-32": 49}


@pytest.fixture(scope="module", params=CELLS)
def model(request: pytest.FixtureRequest) -> Iterator[TwoTower]:
    yield create_two_tower(request.param, seed=0).eval()


def images(model: TwoTower, n: int = 2) -> Tensor:
    return torch.rand(n, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))


def tapped(module: nn.Module, run: object) -> Tensor:
    """What `module` answers while `run()` goes on."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, out: seen.append(out))
    run()  # type: ignore[operator]
    hook.remove()
    return seen[-1]


@torch.no_grad()
def test_image_features(model: TwoTower) -> None:
    x = images(model)
    got = model.image(x)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = (x - mean) / std
    expected = model.clip.encode_image(pixels, normalize=True)
    torch.testing.assert_close(got.pooled, expected, atol=1e-5, rtol=1e-4)
    assert got.local.sizes.tolist() == [CELLS[model.name]] * 2 and got.local.dim == got.pooled.shape[1]
    got.local.validate()

    visual = model.clip.visual
    if model.name == "ViT-B-32":
        states = tapped(visual.transformer, lambda: model.clip.encode_image(pixels))
        projected = F.normalize(visual.ln_post(states) @ visual.proj, dim=-1)
        torch.testing.assert_close(projected[:, 0], expected, atol=1e-5, rtol=1e-4)  # the same road as the class token
        cells = projected[:, 1:]
    elif model.name == "RN50":
        last = tapped(visual.layer4, lambda: model.clip.encode_image(pixels)).flatten(2).mT
        pool = visual.attnpool
        cells = F.normalize(pool.c_proj(pool.v_proj(last)), dim=-1)
    else:
        last = tapped(visual.layer3, lambda: model.clip.encode_image(pixels)).flatten(2).mT
        assert model.local_head is not None
        cells = F.normalize(model.local_head(last), dim=-1)
    torch.testing.assert_close(got.local.values.view_as(cells), cells, atol=1e-5, rtol=1e-4)
    assert (got.local[0] - got.local[0][0]).abs().max() > 1e-3, "every cell says the same"

    with pytest.raises(ValueError, match=rf"{model.image_size} px"):
        model.image(x[..., :-2])


def test_no_image_at_all_has_features_that_gradients_pass_through(model: TwoTower) -> None:
    """A rank's part of a few rows may be none of them; it has to take part in the backward pass all the same."""
    got = model.image(images(model, 0))
    assert got.pooled.shape == (0, model.clip.text_projection.shape[1]) and len(got.local) == 0
    assert got.pooled.requires_grad
    got.pooled.sum().backward()
    model.zero_grad()


@torch.no_grad()
def test_resnet_cells_are_what_the_attention_pool_averages() -> None:
    """MaskCLIP: with attention made uniform and positions taken out, the pooled vector is the mean over the cells and
    their mean, each through the value and output projections."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(image_size=128, layers=(1, 1, 1, 1), width=8)
    clip = CLIP(32, vision, CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=1, layers=1))
    model = TwoTower(clip, "RN50").eval()
    pool = model.clip.visual.attnpool
    for part in (pool.q_proj.weight, pool.q_proj.bias, pool.positional_embedding):
        part.zero_()
    x = images(model)
    last = tapped(model.clip.visual.layer4, lambda: model.image(x)).flatten(2).mT
    raw = pool.c_proj(pool.v_proj(last))
    torch.testing.assert_close(F.normalize(raw, dim=-1).flatten(0, 1), model.image(x).local.values)
    torch.testing.assert_close(F.normalize(raw.mean(1), dim=-1), model.image(x).pooled, atol=1e-5, rtol=1e-4)


def test_captions_and_images_meet_in_one_space(model: TwoTower) -> None:
    with torch.no_grad():
        text = model.text(model.tokenize(["banana", "a polar bear on the ice"]))
    assert text.pooled.shape == (2, model.clip.visual.output_dim) and text.local.dim == text.pooled.shape[1]
    assert open_clip_model_size(model.name) == model.image_size


def test_float32_under_autocast() -> None:
    model = create_two_tower("otcclip-tiny", seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = model.image(images(model)), model.text(model.tokenize(["banana"]))
    assert {t.dtype for f in (image, text) for t in (f.pooled, f.local.values)} == {torch.float32}


@torch.no_grad()
def test_temperature_is_capped() -> None:
    model = create_two_tower("otcclip-tiny", seed=0)
    torch.testing.assert_close(model.logit_scale, torch.tensor(1 / 0.07))
    model.clip.logit_scale.fill_(9.0)
    assert model.logit_scale == 100


def test_seeded_creation() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (create_two_tower("otcclip-tiny", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    pairs = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert one.local_head is not None and other.local_head is not None
    assert not torch.equal(one.local_head.weight, other.local_head.weight)
    assert not torch.equal(one.clip.token_embedding.weight, other.clip.token_embedding.weight)


def test_unknown_model_is_one_line() -> None:
    with pytest.raises(UserError, match="model 'RN5O': open_clip knows no such model"):
        create_two_tower("RN5O")


def test_tower_without_local_features_is_refused() -> None:
    strange = nn.ModuleDict({"visual": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"'strange': local features are built for .* not for ModuleDict/Linear"):
        TwoTower(strange, "strange")  # type: ignore[arg-type]
