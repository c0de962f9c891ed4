"""Sounds as spectrograms: what a model of sounds and captions is trained on.

PCM `.wav` files, read with the standard library; nothing is decoded that could run away: bytes are capped, and three
seconds are kept. A spectrogram has 64 bands of pitch, equally wide in octaves, and 64 frames: log energy over 60 dB,
uint8, as an image of one channel.
"""

from __future__ import annotations

import re
import wave
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.errors import UserError

RATE, SECONDS, SIDE = 16_000, 3.0, 64
WINDOW, LOWEST, RANGE_DB = 1024, 80.0, 60.0
MAX_BYTES = 64 << 20


def load_wav(path: Path) -> NDArray[np.float32]:
    """The first three seconds as mono floats in -1..1 at 16 kHz, `[m]`.

    Raises:
        UserError: not PCM WAV of 8 or 16 bits, empty, or too large.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            if width not in (1, 2) or not 1 <= channels <= 8 or not 1000 <= rate <= 192_000:
                raise UserError(f"{path}: {8 * width} bits, {channels} channels, {rate} Hz is not read")
            data = file.readframes(int(rate * SECONDS))
    except (OSError, EOFError, wave.Error) as error:
        raise UserError(f"{path}: not a readable WAV file: {error}") from error
    data = data[: len(data) // (width * channels) * width * channels]
    if not data:
        raise UserError(f"{path}: holds no sound")
    if width == 2:
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    else:
        samples = (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    mono = samples.reshape(-1, channels).mean(axis=1)
    count = max(1, int(len(mono) * RATE / rate))
    resampled: NDArray[np.float64] = np.interp(np.arange(count) * (rate / RATE), np.arange(len(mono)), mono)
    return resampled.astype(np.float32)


def spectrogram(sound: NDArray[np.float32]) -> Tensor:
    """`[1, 64, 64]` uint8 of a mono sound at 16 kHz, padded with silence or cut to three seconds; low pitch first."""
    length = int(RATE * SECONDS)
    x = torch.zeros(length)
    x[: min(length, len(sound))] = torch.from_numpy(sound[:length].copy())
    hop = length // SIDE
    power = torch.stft(x, WINDOW, hop, window=torch.hann_window(WINDOW), return_complex=True).abs().square()[:, :SIDE]
    frequency = torch.linspace(0, RATE / 2, power.shape[0])
    edges = torch.logspace(np.log10(LOWEST), np.log10(RATE / 2), SIDE + 1)
    # A low band is narrower than a bin: each takes the bins within it and the one nearest to its middle.
    middle = (edges[:-1] * edges[1:]).sqrt()
    inside = (frequency >= edges[:-1, None]) & (frequency < edges[1:, None])
    inside[torch.arange(SIDE), (frequency - middle[:, None]).abs().argmin(dim=1)] = True
    bands = inside.float() @ power / inside.sum(dim=1, keepdim=True)
    decibel = 10 * torch.log10(bands.clamp_min(1e-10))
    level = (decibel - decibel.max()) / RANGE_DB + 1
    return (level.clamp(0, 1) * 255).to(torch.uint8)[None]


def caption_of(path: Path) -> str:
    """A file's name as words: `Front_Center.wav` is "front center"."""
    return re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", path.stem)).strip().lower()
