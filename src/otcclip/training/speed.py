"""Memory and speed by flag: activation checkpointing and compilation of the towers' blocks."""

from __future__ import annotations

from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from otcclip.errors import UserError
from otcclip.models import TwoTower


def checkpoint_activations(model: TwoTower) -> None:
    """Recompute transformer blocks in the backward pass instead of keeping what is between them.

    Raises:
        UserError: a ResNet image tower; open_clip has no checkpointing for it.
    """
    if isinstance(model.clip.visual, ModifiedResNet):
        raise UserError(
            f"--grad-checkpointing: {model.name} has a ResNet tower, for which open_clip has none; --accum-freq saves "
            "memory for every tower"
        )
    model.clip.set_grad_checkpointing(True)


def compile_towers(model: TwoTower) -> None:
    """Compile each block in place (names in a checkpoint stay); a block compiled once serves all of its kind."""
    visual = model.clip.visual
    blocks: list[nn.Module] = list(model.clip.transformer.resblocks)
    if isinstance(visual, ModifiedResNet):
        blocks += [block for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4) for block in stage]
    else:
        blocks += list(visual.transformer.resblocks)
    for block in blocks:
        block.compile(dynamic=True)
