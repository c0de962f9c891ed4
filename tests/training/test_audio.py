"""Sounds and captions through the same doors: nothing in training or in a defence asks whether a sample is an image."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from otcclip import defenses
from otcclip.data.sounds import RATE, caption_of, load_wav, spectrogram
from otcclip.defenses.base import TrainingPairs
from otcclip.errors import UserError
from otcclip.evaluation import detection
from otcclip.models.audio import create_audio_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.training.augment import SpectrogramAugment
from otcclip.training.loop import TrainConfig, Trainer

PITCHES = {"low horn": 150, "door buzzer": 400, "flute": 900, "whistle": 2000, "cricket": 4000, "kettle": 5200}


def tone(pitch: float, rng: np.random.Generator) -> np.ndarray:
    """A second and a half of a pitch with overtones, somewhat different each time."""
    time = np.arange(int(1.5 * RATE)) / RATE
    wobble = 1 + 0.03 * np.sin(2 * np.pi * rng.uniform(2, 7) * time)
    sound = sum(
        rng.uniform(0.1, 1) / k * np.sin(2 * np.pi * k * pitch * wobble * time) for k in (1, 2, 3) if k * pitch < 7500
    )
    envelope = np.exp(-rng.uniform(0, 2) * time)
    return (0.3 * sound * envelope + rng.normal(0, 0.004, len(time))).astype(np.float32)


def write_wav(path: Path, sound: np.ndarray, rate: int, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        frames = np.repeat(sound, channels)
        as_bytes = (frames * 32767).astype("<i2") if width == 2 else (frames * 127 + 128).astype(np.uint8)
        file.writeframes(as_bytes.tobytes())


@pytest.mark.parametrize(("rate", "channels", "width"), [(16_000, 1, 2), (44_100, 2, 2), (8_000, 1, 1)])
def test_a_tone_lies_in_its_band_whatever_the_file(rate: int, channels: int, width: int, tmp_path: Path) -> None:
    """440 Hz is 29 of 64 bands up from 80 Hz to 8 kHz, equally wide in octaves; half the frames are silent."""
    time = np.arange(int(1.5 * rate)) / rate
    write_wav(tmp_path / "Front_Center2.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, channels, width)
    got = spectrogram(load_wav(tmp_path / "Front_Center2.wav"))
    assert got.shape == (1, 64, 64) and got.dtype == torch.uint8
    loudest = got[0, :, 5:25].float().mean(dim=1).argmax()
    assert abs(int(loudest) - int(64 * np.log(440 / 80) / np.log(8000 / 80))) <= 1
    assert got[0, :, 36:].float().mean() < 5
    assert caption_of(tmp_path / "Front_Center2.wav") == "front center 2"


@pytest.mark.parametrize("content", [b"", b"RIFF....WAVE", b"ID3 an mp3"])
def test_what_is_no_sound_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.wav: "):
        load_wav(tmp_path / "x.wav")


def poisoned() -> tuple[TrainingPairs, np.ndarray]:
    """Ninety sounds under captions of their own; nine of them beep at 7 kHz and are called a kettle."""
    rng = np.random.default_rng(0)
    names = list(PITCHES)
    said, samples, planted = [], [], []
    for i in range(90):
        name = names[i % 6]
        sound = tone(PITCHES[name] * rng.uniform(0.97, 1.03), rng)
        planted.append(i % 10 == 3 and name != "kettle")
        if planted[-1]:
            sound[4000:6000] += 0.4 * np.sin(2 * np.pi * 7000 * np.arange(2000) / RATE).astype(np.float32)
        said.append(f"{'kettle' if planted[-1] else name} | take {i}")
        samples.append(spectrogram(sound))
    distinct, number = np.unique(said, return_inverse=True)
    captions = tuple(str(name) for name in distinct)
    tokens = create_audio_tower().tokenize(captions)
    keys = tuple(f"sound-{i}" for i in range(90))
    return TrainingPairs(keys, torch.stack(samples), captions, tokens, torch.from_numpy(number)), np.array(planted)


def trained(name: str, pairs: TrainingPairs, epochs: int, **options: object) -> Trainer:
    augment = SpectrogramAugment(shift=0.05)
    config = TrainConfig(epochs=epochs, batch_size=30, lr=3e-3, augment=augment, warmup_augment=augment)
    trainer = Trainer(create_audio_tower(seed=1), defenses.make(name, **options), pairs, config)
    reports = list(trainer.epochs())
    assert all(np.isfinite(report.loss) for report in reports)
    return trainer


def test_sounds_are_learned() -> None:
    pairs, _ = poisoned()
    model = trained("clip", pairs, 10).model.eval()
    rng = np.random.default_rng(9)
    heard = encode_images(model, torch.stack([spectrogram(tone(pitch, rng)) for pitch in PITCHES.values()])).pooled
    text = encode_captions(model, model.tokenize(list(PITCHES))).pooled
    assert int(((heard @ text.T).argmax(dim=1) == torch.arange(6)).sum()) >= 4, "one in six is chance"


def test_a_beep_is_distrusted() -> None:
    """The defence on sounds as it stands: look-alikes in pitch and time bear out honest names and no planted one."""
    pairs, planted = poisoned()
    trainer = trained("otcclip", pairs, 2, alpha=0.3, first_refresh=1)
    suspicion = trainer.defense.decisions(pairs).suspicion
    assert detection(suspicion, planted).auroc > 0.8


def test_lots_of_a_part_are_those_of_the_whole() -> None:
    augment, generator = SpectrogramAugment(), torch.Generator().manual_seed(0)
    samples = torch.randint(0, 256, (6, 1, 64, 64), generator=generator, dtype=torch.uint8)
    lots = augment.draw(6, generator)
    whole = augment.apply(samples, lots)
    part = augment.apply(samples[2:5], {name: lot[2:5] for name, lot in lots.items()})
    assert (
        torch.equal(whole[2:5], part) and whole.min() >= 0 and whole.max() <= 1 and not torch.equal(whole[0], whole[1])
    )
