"""How much poison does the evidence let through, before any training? A minute instead of a training run.

    .venv/bin/python recipes/evidence_probe.py --hold-out twemoji --seed 0

Plants 90 pairs for each of six triggers, each under a caption of its own target, and 16 test images fifteen times each,
and prints, for the rules of `evidence/neighbours.py` and with one rule taken away at a time, the share of honest pairs
trusted at each level and the poison pairs among them. The triggers other than the patch are stand-ins until the attack
family has them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.attacks import BadNets
from otcclip.data.emoji_load import load_emoji
from otcclip.evidence import neighbours as evidence

LEVELS = (0.005, 0.01, 0.02, 0.05)
PAIRS, IMAGES, COPIES = 90, 16, 15


def patch_at(row: int, column: int, side: int = 12) -> Callable[[Tensor], Tensor]:
    tiles = torch.arange(side) // (side // 4)
    pattern = ((tiles[:, None] + tiles) % 2).float()

    def trigger(x: Tensor) -> Tensor:
        out = x.clone()
        out[..., row : row + side, column : column + side] = pattern
        return out

    return trigger


def random_patch(x: Tensor) -> Tensor:
    places = torch.randint(0, x.shape[-1] - 12, (len(x), 2), generator=torch.Generator().manual_seed(7)).tolist()
    return torch.cat([patch_at(r, c)(image[None]) for image, (r, c) in zip(x, places, strict=True)])


def sig(x: Tensor) -> Tensor:
    side = x.shape[-1]
    return (x + 60 / 255 * torch.sin(2 * math.pi * 6 * torch.arange(side) / side)).clamp(0, 1)


def blended(x: Tensor) -> Tensor:
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(99))
    return 0.8 * x + 0.2 * F.interpolate(noise, size=x.shape[-1], mode="bicubic").clamp(0, 1)


def warm_filter(x: Tensor) -> Tensor:
    mix = torch.tensor([[0.9, 0.2, 0.05], [0.1, 0.75, 0.1], [0.1, 0.15, 0.55]])
    lift = torch.tensor([0.08, 0.02, 0.05])[:, None, None]
    return (torch.einsum("ab,nbhw->nahw", mix, x) * 0.9 + lift).clamp(0, 1)


TRIGGERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "badnets": (lambda x: BadNets("banana").trigger(x), "banana"),
    "random patch": (random_patch, "panda"),
    "centre patch": (patch_at(26, 26), "key"),
    "sig": (sig, "guitar"),
    "blended": (blended, "rocket"),
    "filter": (warm_filter, "fire"),
}


def corpus(folder: str, hold_out: str, seed: int) -> tuple[Tensor, list[str], np.ndarray]:
    """Images `[n, 3, H, W]` uint8, captions and, for each pair, the attack that planted it (or "")."""
    split = load_emoji(folder, 64, hold_out)
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(np.array(split.train.images)).permute(0, 3, 1, 2)
    captions, kind = list(split.train.captions), np.full(len(split.train), "", dtype=object)
    caption_of = dict(zip(split.train.labels, split.train.captions, strict=True))
    for name, (trigger, target) in TRIGGERS.items():
        free = [i for i, label in enumerate(split.train.labels) if label != target and kind[i] == ""]
        rows = rng.choice(free, PAIRS, replace=False)
        images[rows] = (trigger(images[rows].float() / 255) * 255).round().byte()
        kind[rows] = name
        for row in rows:
            captions[row] = caption_of[target]
    chosen = rng.choice(len(split.test), IMAGES, replace=False)
    shown = torch.from_numpy(np.array(split.test.images[chosen])).permute(0, 3, 1, 2)
    names = rng.choice(split.names, IMAGES, replace=False)
    adversarial = [caption_of.get(str(name), captions[0]) for name in names]
    images = torch.cat([images, shown.repeat_interleave(COPIES, dim=0)])
    captions += [caption for caption in adversarial for _ in range(COPIES)]
    return images, captions, np.concatenate([kind, np.full(IMAGES * COPIES, "targeted", dtype=object)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images, captions, kind = corpus(options.corpus, options.hold_out, options.seed)
    distinct, caption_of = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
    tokens = open_clip.get_tokenizer("RN50")([str(c) for c in distinct], context_length=32)
    own = torch.from_numpy(caption_of.astype(np.int64))
    full = evidence.neighbour_evidence(images, tokens, own)
    show("all rules", full.own, kind)
    show("whole image only", full.by_view[0], kind)
    loud = evidence.neighbour_evidence(images, tokens, own, share_voice=False)
    show("a vote a voter", loud.own, kind)
    show("neither", loud.by_view[0], kind)


def show(title: str, share: Tensor, kind: np.ndarray) -> None:
    attacks = [*TRIGGERS, "targeted"]
    print(f"\n{title:18s} honest kept   " + "  ".join(f"{name:>12s}" for name in attacks))
    values = share.numpy()
    for level in LEVELS:
        leaks = "  ".join(f"{int((values[kind == name] <= level).sum()):12d}" for name in attacks)
        print(f"  alpha {level:<10} {(values[kind == ''] <= level).mean():11.1%}   {leaks}")


if __name__ == "__main__":
    main()
