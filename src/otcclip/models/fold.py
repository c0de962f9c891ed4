"""A network for inference alone: every batch norm folded into the convolution before it.

In evaluation a batch norm is a scale and a shift a channel, which the convolution's weight and bias can hold
(Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference", 2018,
section 3.2); what is left out is a pass over every map. Answers differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Network = TypeVar("Network", bound=nn.Module)


def folded(network: Network) -> Network:
    """A copy of `network`, whose convolutions hold the batch norms that are registered right after them.

    open_clip's ResNets and timm's convolutional networks register their layers in the order of use; a network that
    does not is not for this function. The copy is in evaluation mode. It requires gradient where the network does, for
    autocast casts weights that require none anew for every batch.

    Args:
        network: its running statistics are those of training; it is left as it is. One in evaluation mode with nothing
            to fold is returned itself: there is no reason to hold a transformer twice.

    Raises:
        ValueError: a batch norm that keeps no running statistics.
    """
    if not network.training and not any(_followed(network)):
        return network
    out = deepcopy(network).eval()
    for parent, name, convolution, norm in list(_followed(out)):
        _fold(convolution, norm)
        setattr(parent, name, _rest(norm))
    return out


def _followed(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions that a batch norm follows: where the norm is, under what name, and both."""
    for parent in network.modules():
        for (_, convolution), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                yield parent, name, convolution, norm


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError(f"{norm}: keeps no running statistics, which is what a batch norm is in evaluation")
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )


def _rest(norm: nn.BatchNorm2d) -> nn.Module:
    """What else the layer does: timm's batch norms hold their activation."""
    return nn.Sequential(*(part for part in norm.children() if not isinstance(part, nn.Identity)))
