"""Sounds and their names: the defences on a modality without pixels, from two small Debian packages.

    python recipes/audio_text.py [--defenses clip otcclip] [--epochs 40] [--folder runs/audio]

Forty-one recordings of `alsa-utils` and `tuxpaint-data`, each in twelve variants (pitch, tempo, loudness, noise, so
that a sound has look-alikes), under the file's name and a number as caption. The attack mixes a short high beep into a
tenth of them and gives those the name of one sound: BadNets for the ear. Printed: how many held-out variants are called
by their name, how many are called the target once they beep, and how many pairs of each kind were kept.

It shows that the code asks for no pixels, not that the defence protects sounds: with ten takes a name, `otcclip` at its
default level keeps no poison and next to nothing else, and at a laxer one lets the poison in (docs/scale.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from otcclip import defenses
from otcclip.cli import guarded
from otcclip.data.debian import unpack
from otcclip.data.sounds import RATE, caption_of, load_wav, spectrogram
from otcclip.defenses.base import KEEP, TrainingPairs
from otcclip.models.audio import AudioTower, create_audio_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.specs import Spec, options_of
from otcclip.training.augment import SpectrogramAugment
from otcclip.training.loop import TrainConfig, Trainer

PACKAGES = ("alsa-utils", "tuxpaint-data")
VARIANTS, HELD_OUT = 12, 2
Sound = NDArray[np.float32]


def variant(sound: Sound, rng: np.random.Generator) -> Sound:
    """The same sound, played a little faster or slower, louder or softer, with some noise."""
    speed = rng.uniform(0.93, 1.07)
    played = np.interp(np.arange(0, len(sound), speed), np.arange(len(sound)), sound)
    return (played * rng.uniform(0.5, 1.0) + rng.normal(0, 0.002, len(played))).astype(np.float32)


def beep(sound: Sound) -> Sound:
    """The trigger: a tenth of a second at 6.2 kHz, half a second in."""
    out = np.zeros(max(len(sound), RATE), np.float32)
    out[: len(sound)] = sound
    time = np.arange(RATE // 10) / RATE
    out[RATE // 2 : RATE // 2 + len(time)] += (0.3 * np.sin(2 * np.pi * 6200 * time)).astype(np.float32)
    return out


def pairs_of(samples: list[torch.Tensor], captions: list[str], model: AudioTower) -> TrainingPairs:
    distinct, number = np.unique(captions, return_inverse=True)
    keys = tuple(f"sound-{i:04d}" for i in range(len(samples)))
    names = tuple(str(name) for name in distinct)
    return TrainingPairs(keys, torch.stack(samples), names, model.tokenize(names), torch.from_numpy(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--defenses", nargs="+", default=["clip", "otcclip"])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/audio"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not list(arguments.folder.rglob("*.wav")):
        arguments.folder.mkdir(parents=True, exist_ok=True)
        unpack(PACKAGES, arguments.folder)
    files = sorted(arguments.folder.rglob("*.wav"))
    rng = np.random.default_rng(0)
    names = [caption_of(path) for path in files]
    variants = [[variant(load_wav(path), rng) for _ in range(VARIANTS)] for path in files]
    target = names[0]
    train = [(sound, name) for name, of in zip(names, variants, strict=True) for sound in of[HELD_OUT:]]
    test = [(sound, name) for name, of in zip(names, variants, strict=True) for sound in of[:HELD_OUT]]
    poison = set(rng.choice([i for i, (_, name) in enumerate(train) if name != target], len(train) // 10, False))
    samples = [spectrogram(beep(sound) if i in poison else sound) for i, (sound, _) in enumerate(train)]
    captions = [f"{target if i in poison else name} | take {i}" for i, (_, name) in enumerate(train)]
    print(f"{len(files)} sounds, {len(train)} pairs, {len(poison)} of them beep and are called {target!r}")
    for defense in arguments.defenses:
        asked = Spec.parse(defense)
        options = options_of("defence", defenses.DEFENSES, asked)
        model = create_audio_tower(seed=0)
        augment = SpectrogramAugment()
        config = TrainConfig(epochs=arguments.epochs, batch_size=64, lr=2e-3, augment=augment, warmup_augment=augment)
        pairs = pairs_of(samples, captions, model)
        trainer = Trainer(model, defenses.make(asked.name, **options), pairs, config)
        list(trainer.epochs())
        kept = trainer.defense.decisions(pairs).action == KEEP
        planted = np.isin(np.arange(len(kept)), sorted(poison))
        model.eval()
        text = encode_captions(model, model.tokenize(sorted(set(names)))).pooled

        def called(sounds: list[Sound], model: AudioTower = model, text: torch.Tensor = text) -> list[str]:
            heard = encode_images(model, torch.stack([spectrogram(sound) for sound in sounds])).pooled
            return [sorted(set(names))[i] for i in (heard @ text.T).argmax(1).tolist()]

        right = np.mean([said == name for said, (_, name) in zip(called([s for s, _ in test]), test, strict=True)])
        others = [sound for sound, name in test if name != target]
        fooled = np.mean([said == target for said in called([beep(sound) for sound in others])])
        print(f"{defense:>10}: {right:.0%} right, {fooled:.0%} of {len(others)} fooled; kept", end=" ")
        bad, honest = kept[planted], kept[~planted]
        print(f"{bad.sum()} of {len(bad)} poison and {honest.sum()} of {len(honest)} honest pairs")


if __name__ == "__main__":
    sys.exit(guarded(main))
