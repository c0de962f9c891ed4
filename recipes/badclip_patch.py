"""Optimise the patch of the `badclip` attack against a finished run's model; minutes on a core.

    .venv/bin/python recipes/badclip_patch.py --surrogate runs/demo/clip --target banana --out runs/badclip/banana.npy

The surrogate should be a run that was never poisoned: a model that already knows a trigger there makes the patch easy.
Then `badclip:target=banana,patch=runs/badclip/banana.npy` is an attack like any other. Prints the share of test images
of other classes that the surrogate itself calls the target, without and with the patch.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from otcclip.attacks import BadCLIP, PoisonContext, apply_trigger, load_surrogate
from otcclip.cli import guarded
from otcclip.data.emoji_load import load_emoji


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--surrogate", required=True, help="folder of a finished run")
    parser.add_argument("--out", required=True, help="the .npy file to write")
    parser.add_argument("--target", default="banana")
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    surrogate = load_surrogate(options.surrogate)
    split = load_emoji(options.corpus, surrogate.image_size, options.hold_out)
    corpus = PoisonContext.of(split.train, split.test, surrogate)
    attack = BadCLIP.optimise(options.target, corpus, options.out, seed=options.seed, steps=options.steps)

    others = np.flatnonzero(np.asarray(split.test.labels, dtype=object) != options.target)
    images, target = split.test.images[others], split.names.index(options.target)
    names = surrogate.read(split.names).pooled
    for words, shown in (("without", images), ("with", apply_trigger(attack, images))):
        said = []
        for part in torch.from_numpy(shown).permute(0, 3, 1, 2).split(256):
            with torch.no_grad():
                said.append((surrogate.see(part.float() / 255).pooled @ names.T).argmax(1))
        rate = float((torch.cat(said) == target).float().mean())
        print(f"{words:8s} the patch: {rate:.1%} of {len(others)} called {options.target}")


if __name__ == "__main__":
    sys.exit(guarded(main))
