"""`TwoTower`: an open_clip model seen as pooled vectors and sets of local vectors, for images and for captions.

    model = create_two_tower("otcclip-tiny")          # or RN50, ViT-B-32, with pretrained=...
    image = model.image(images)                        # images: [n, 3, H, W] float in 0..1
    text = model.text(model.tokenize(captions))
    image.pooled @ text.pooled.T                       # cosine
    transport.pair_costs(image.local, text.local)      # patches against tokens

Local image vectors are grid cells, projected into the joint space:

* ResNet towers: the last feature map through the attention pool's value and output projections, which is what that
  pool averages (Zhou et al., MaskCLIP, 2022, section 3.2). RN50: 7 x 7 cells.
* ViT towers: the last block's patch tokens through `ln_post` and `proj`. ViT-B-32: 7 x 7 cells.
* Towers whose last map is smaller than 4 x 4 (the tiny model) use the map before it and a learned linear head that
  lives here, beside the open_clip model and not in its checkpoint.

Local text vectors are the caption's real tokens through `ln_final` and the text projection: no start, end or padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from otcclip.errors import UserError
from otcclip.models.text import TextStates, text_states
from otcclip.transport import FeatureSets

MIN_CELLS = 16
CAUSE = 160  # characters of another library's complaint that a line of ours repeats


@dataclass(frozen=True)
class Features:
    """One modality of `n` pairs: `pooled [n, d]` and `local`, `n` sets of `d`-vectors; unit norm, float32."""

    pooled: Tensor
    local: FeatureSets


class TwoTower(nn.Module):
    """An open_clip model behind one door; `clip` is the untouched open_clip module."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: CLIP, name: str) -> None:
        super().__init__()
        if not isinstance(clip, CLIP) or not isinstance(clip.visual, ModifiedResNet | VisionTransformer):
            raise UserError(
                f"model {name!r}: local features are built for open_clip's ResNet and ViT towers with its own text "
                f"tower, not for {type(clip).__name__}/{type(clip.visual).__name__}"
            )
        self.clip = clip
        self.name = name
        size = clip.visual.image_size
        self.image_size = int(size[0] if isinstance(size, tuple) else size)
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.local_head: nn.Linear | None = None
        if isinstance(clip.visual, ModifiedResNet) and (self.image_size // 32) ** 2 < MIN_CELLS:
            width = clip.visual.layer3[-1].bn3.num_features
            self.local_head = nn.Linear(width, clip.visual.output_dim, bias=False)

    @property
    def logit_scale(self) -> Tensor:
        """The temperature's inverse, capped at 100 as in Radford et al. (2021)."""
        scale: Tensor = self.clip.logit_scale
        return scale.exp().clamp(max=100.0)

    def tokenize(self, captions: Sequence[str]) -> Int[Tensor, "n context"]:
        """BPE tokens, zero-padded and truncated to the model's context length."""
        return _tokenizer(self.name)(list(captions))  # type: ignore[no-any-return]

    def image(self, images: Float[Tensor, "n 3 h w"]) -> Features:
        """Features of images given as floats in 0..1 at the model's input size.

        Raises:
            ValueError: another size than the model's.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images: {self.name} sees {self.image_size} px, got {tuple(images.shape)}")
        pixels = (images - self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
        if self.local_head is not None:
            # open_clip 3.3 stops its ResNet after the last map asked for, so the last one (4) is asked for too.
            out = self.clip.visual.forward_intermediates(pixels, indices=[3, 4])
            cells = out["image_intermediates"][0].flatten(2).transpose(1, 2)
            local, pooled = self.local_head(cells), out["image_features"]
        elif isinstance(self.clip.visual, ModifiedResNet):
            out = self.clip.visual.forward_intermediates(pixels, indices=[4])
            pool = self.clip.visual.attnpool
            cells = out["image_intermediates"][0].flatten(2).transpose(1, 2)
            local, pooled = pool.c_proj(pool.v_proj(cells)), out["image_features"]
        else:
            # open_clip's transformer cannot reshape a batch of none, which is what a rank's part of a few rows may be.
            some = pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:])
            out = self.clip.visual.forward_intermediates(some, indices=1, output_fmt="NLC")
            cells = self.clip.visual.ln_post(out["image_intermediates"][-1])
            local, pooled = (cells @ self.clip.visual.proj)[: len(pixels)], out["image_features"][: len(pixels)]
        return Features(unit(pooled), FeatureSets.from_dense(unit(local)))

    def text(self, tokens: Int[Tensor, "n context"]) -> Features:
        """Features of tokenised captions. A caption without a real token stands for itself by its pooled vector."""
        states: TextStates = text_states(self.clip, tokens)
        return Features(unit(states.pooled), FeatureSets(unit(states.tokens), states.offsets))


@cache
def _tokenizer(name: str) -> Any:
    """Not a model's own: 50,000 merges would be copied with it wherever a model is (`fold.folded`), .4 s each time."""
    return open_clip.get_tokenizer(name)


def unit(x: Tensor) -> Tensor:
    """Unit vectors along the last dimension, float32 (float64 of a model in float64)."""
    # Under autocast the towers answer in bf16; norms and costs are float32 from here on.
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def create_two_tower(name: str, pretrained: str | None = None, *, seed: int | None = None) -> TwoTower:
    """A `TwoTower` around `open_clip.create_model(name, pretrained)`.

    Args:
        name: an open_clip model name; `otcclip-tiny` for 64 px on a CPU.
        pretrained: a tag or a checkpoint path, as open_clip takes it.
        seed: seeds the initial weights without touching the global generator.

    Raises:
        UserError: open_clip knows no such model, no such tag or file, the file is damaged or of another model, or the
            tower has no local features here.
    """
    if name not in open_clip.list_models():
        raise UserError(f"model {name!r}: open_clip knows no such model; see open_clip.list_models()")
    if pretrained is not None and not Path(pretrained).is_file() and not open_clip.get_pretrained_cfg(name, pretrained):
        raise UserError(f"{pretrained}: neither a file nor a tag that open_clip has for {name}")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with weights_of(name, pretrained) if pretrained is not None else nullcontext():
            clip = open_clip.create_model(name, pretrained=pretrained)
        model = TwoTower(clip, name)
    model.to(memory_format=torch.channels_last)
    return model


@contextmanager
def weights_of(name: str, source: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong in reading weights of the model `name` from `source` into one line.

    Raises:
        UserError: instead of any exception, of which torch, safetensors and open_clip raise a dozen kinds.
    """
    try:
        yield
    except Exception as error:
        said = str(error).strip()
        # torch's own line advises to load the file as code; whoever does not trust pairs does not trust that either.
        line = "not plain tensors" if "weights_only" in said else said.partition("\n")[0]
        why = f"{type(error).__name__}: {line}".removesuffix(": ")[:CAUSE]
        what = "not weights of" if Path(source).exists() else "cannot get weights of"
        raise UserError(f"{source}: {what} {name} ({why})") from error
