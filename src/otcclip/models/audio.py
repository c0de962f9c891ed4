"""Sound behind the `TwoTower` door: a small tower for spectrograms beside open_clip's text tower.

    model = create_audio_tower(seed=0)
    sound = model.image(spectrograms)              # [n, 1, BANDS, FRAMES] floats in 0..1; see data/sounds.py
    text = model.text(model.tokenize(captions))

The door's first modality is called `image` because that is what nearly everybody puts there; nothing behind it, and
nothing in transport, defences or training, asks whether it is one. A sound's local vectors are cells of time and pitch.
"""

from __future__ import annotations

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor, nn

from otcclip.models.two_tower import Features, TwoTower, unit
from otcclip.transport import FeatureSets

TEXT = "otcclip-tiny"  # its text tower; the image tower is left out
SIDE = 64


class _Spectrogram(nn.Module):
    """Four strided convolutions: `[n, 1, 64, 64]` to `[n, 16 cells, d]`."""

    def __init__(self, width: int, output_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out in (width, 2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Linear(channels, output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.layers(x).flatten(2).transpose(1, 2)
        out: Tensor = self.proj(cells)
        return out


class AudioTower(TwoTower):
    """A `TwoTower` of sounds and captions."""

    def __init__(self, width: int = 24) -> None:
        nn.Module.__init__(self)
        config = open_clip.get_model_config(TEXT)
        self.clip = open_clip.create_model(TEXT)
        self.clip.visual = _Spectrogram(width, int(config["embed_dim"]))
        self.name = "otcclip-audio"
        self.image_size = SIDE
        self.tokenizer = open_clip.get_tokenizer(TEXT)
        self.local_head = None
        self.register_buffer("mean", torch.tensor(0.5).view(1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(0.25).view(1, 1, 1, 1), persistent=False)

    def image(self, images: Float[Tensor, "n 1 bands frames"]) -> Features:
        """Features of spectrograms.

        Raises:
            ValueError: another shape than `[n, 1, 64, 64]`.
        """
        if images.shape[1:] != (1, SIDE, SIDE):
            raise ValueError(f"spectrograms: expected [n, 1, {SIDE}, {SIDE}], got {tuple(images.shape)}")
        cells = self.clip.visual((images - self.mean) / self.std)
        return Features(unit(cells.mean(dim=1)), FeatureSets.from_dense(unit(cells)))


def create_audio_tower(seed: int = 0) -> AudioTower:
    """A new tower with seeded weights; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AudioTower()
