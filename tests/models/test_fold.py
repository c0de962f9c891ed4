"""A network without its batch norms answers as it did with them."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from otcclip.models import create_two_tower
from otcclip.models.fold import folded


def lived_in(network: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: neither their statistics nor their gains say nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
            module.weight.data.copy_(draw(module.weight, 0.5, 1.5))
            module.bias.data.copy_(draw(module.bias, -0.3, 0.3))
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(("name", "side"), [("otcclip-tiny", 64), ("RN50", 224)])
@torch.no_grad()
def test_resnet_towers(name: str, side: int) -> None:
    model = create_two_tower(name, seed=0)
    lived_in(model)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected, state = model.image(images), {key: value.clone() for key, value in model.state_dict().items()}
    bare = folded(model)
    got = bare.image(images)
    torch.testing.assert_close(got.pooled, expected.pooled, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.local.values, expected.local.values, atol=1e-4, rtol=0)
    assert norms(bare) == 0 < norms(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()), "the model was changed"


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "resnet18"])
@torch.no_grad()
def test_timm_networks_keep_their_activations(name: str) -> None:
    network = lived_in(timm.create_model(name, pretrained=False))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = network(images)
    bare = folded(network)
    torch.testing.assert_close(bare(images), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
    assert norms(bare) == 0 < norms(network)


def test_what_has_nothing_to_fold_is_not_held_twice() -> None:
    model = create_two_tower("ViT-B-32", seed=0).eval()
    assert folded(model) is model and all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_a_norm_that_follows_no_convolution_stays() -> None:
    network = lived_in(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    images = torch.rand(2, 3, 8, 8)
    bare = folded(nn.Sequential(network, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).eval()))
    assert norms(bare) == 2
    assert torch.equal(bare[0](images), network(images))


def test_a_network_in_training_is_folded_for_evaluation_and_goes_on_training() -> None:
    model = create_two_tower("otcclip-tiny", seed=0).train()
    assert not folded(model).training and model.training


def test_statistics_of_the_batch_cannot_be_folded() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="running statistics"):
        folded(network)
