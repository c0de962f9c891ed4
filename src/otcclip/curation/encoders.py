"""What scans ask of an encoder: features of decoded images and of captions, and what they may be compared with.

encoder = clip_encoder("ViT-B-32", "path/or/tag")       # any open_clip model that TwoTower opens, ours included
encoder = trusted_encoder()                             # an image tower and a sentence encoder from local files
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otcclip.curation.trusted import load_image_tower, load_sentence_encoder
from otcclip.errors import UserError
from otcclip.models import Features, TwoTower, create_two_tower, load_two_tower
from otcclip.models.checkpoint import LOCAL_HEAD, WEIGHTS
from otcclip.models.encode import encode_captions, encode_images
from otcclip.models.fold import folded
from otcclip.transport import FeatureSets

BATCH = 64
PROJECTED = 256  # a cell's 1,280 numbers, projected: cosines are kept to about 1 / sqrt(256) (Johnson-Lindenstrauss)


class ScanEncoder(Protocol):
    """Features for detectors.

    Attributes:
        name: for people. image_size: side in pixels of the images it is given.
        joint: whether image and text vectors share a space. local: whether patches and tokens do.
    """

    name: str
    image_size: int
    joint: bool
    local: bool

    def images(self, images: Tensor) -> Features:
        """Features of `images [n, 3, image_size, image_size]` uint8."""
        ...

    def captions(self, captions: Sequence[str]) -> Features: ...

    def identity(self) -> dict[str, str]:
        """What its features depend on, its weights among it: a resumed scan must agree in this."""
        ...


class ClipEncoder:
    """An open_clip model."""

    def __init__(self, model: TwoTower, *, local: bool = True) -> None:
        self._weights = digest(model)
        self.model = folded(model.eval())
        self.name, self.image_size, self.joint, self.local = model.name, model.image_size, True, local

    def images(self, images: Tensor) -> Features:
        return encode_images(self.model, images)

    def captions(self, captions: Sequence[str]) -> Features:
        return encode_captions(self.model, self.model.tokenize(captions))

    def identity(self) -> dict[str, str]:
        return {"model": self.name, "weights": self._weights}


class TrustedEncoder:
    """Two encoders that never saw the pairs and share no space: look-alikes can be asked, cosines cannot."""

    joint = local = False

    def __init__(self, image: nn.Module, text: nn.Module, name: str, source_size: int) -> None:
        self._weights = f"{digest(image)} {digest(text)}"
        self.image, self.text, self.name, self.image_size = folded(image), text, name, source_size
        self._projection: Tensor | None = None

    @torch.no_grad()
    def images(self, images: Tensor) -> Features:
        parts = []
        for batch in images.split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                cells = self.image(batch.float() / 255)
            if self._projection is None:
                draw = torch.randn(cells.shape[-1], PROJECTED, generator=torch.Generator().manual_seed(0))
                self._projection = draw / PROJECTED**0.5
            parts.append(cells @ self._projection)
        cells = torch.cat(parts)
        pooled = F.normalize(cells.mean(dim=1), dim=-1)
        return Features(pooled, FeatureSets.from_dense(F.normalize(cells, dim=-1)))

    def captions(self, captions: Sequence[str]) -> Features:
        # Sorted by length, so that a batch is hardly padded.
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        parts = [
            self.text([captions[i] for i in order[start : start + BATCH]]) for start in range(0, len(order), BATCH)
        ]
        back = torch.argsort(torch.tensor(order))
        local = FeatureSets.concatenate([part[1] for part in parts])
        return Features(torch.cat([part[0] for part in parts])[back], local.take(back))

    def identity(self) -> dict[str, str]:
        return {"model": self.name, "weights": self._weights}


def clip_encoder(model: str, pretrained: str | None) -> ClipEncoder:
    """An open_clip model by name, with a tag or a checkpoint path as open_clip takes it, or one of our run folders.

    A small model's local head lies beside its weights (`models.checkpoint`); without it patches and tokens cannot be
    compared, and the detectors that need that are left out.

    Raises:
        UserError: no weights named, no such model or file, or weights of another model.
    """
    if pretrained is None:
        raise UserError(
            f"--pretrained: name the weights of {model} (a tag of open_clip's or a path); untrained ones say nothing"
        )
    path = Path(pretrained)
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS else None
    if path.is_dir() and not (path / WEIGHTS).is_file():
        raise UserError(f"--pretrained {path}: no {WEIGHTS} in this folder")
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and not path.is_file():
        raise UserError(f"--pretrained {path}: no such file")
    if folder is not None and (folder / LOCAL_HEAD).is_file():
        return ClipEncoder(load_two_tower(folder, model))
    tower = create_two_tower(model, pretrained=str(folder / WEIGHTS) if folder is not None else pretrained)
    return ClipEncoder(tower, local=tower.local_head is None)


def trusted_encoder(
    image_model: str = "tf_efficientnet_lite0",
    image_weights: Path | None = None,
    text_weights: Path | None = None,
    image_size: int | None = None,
) -> TrustedEncoder:
    """An image tower (timm) and a sentence encoder from local files (`curation.trusted`).

    Raises:
        UserError: a file is missing or of another model.
    """
    image = load_image_tower(image_model, image_weights, image_size)
    text = load_sentence_encoder(text_weights)
    return TrustedEncoder(image, text, f"{image_model} + sentence encoder", image.size)


def digest(model: nn.Module) -> str:
    """The weights' fingerprint."""
    state = hashlib.blake2b(digest_size=12)
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
