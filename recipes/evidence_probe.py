"""How much poison does the evidence let through, before any training? A minute instead of a training run.

    .venv/bin/python recipes/evidence_probe.py --hold-out twemoji --seed 0

Plants attacks, each with a target of its own, and prints for every level the share of honest pairs trusted and the
poison pairs among them. First the plain attacks in one corpus, under the rules of `evidence/neighbours.py` and with one
rule taken away at a time; then the adaptive attacks that need no model, in a second corpus, under all rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from torch import Tensor

from otcclip import attacks
from otcclip.attacks import Attack, make
from otcclip.data.emoji_load import load_emoji
from otcclip.data.pairs import PairStore
from otcclip.evidence import neighbours as evidence

LEVELS = (0.005, 0.01, 0.02, 0.05)

PLAIN: tuple[Attack, ...] = (
    make("badnets", target="banana"),
    make("badnets", target="panda", location="random", colours="red-cyan", name="random place"),
    make("badnets", target="key", location="center", colours="blue-yellow", name="centre"),
    make("sig", target="guitar"),
    make("blended", target="rocket"),
    make("filter", target="fire"),
    make("wanet", target="cactus"),
    make("clean-label", target="snail"),
    make("label-swap"),
    make("targeted"),
)
ADAPTIVE: tuple[Attack, ...] = (
    make("tiled", target="banana"),
    make("mixed-captions", target="guitar"),
    make("mimicry", target="rocket"),
    make("jittered"),
)


def judge(train: PairStore, test: PairStore, crew: Sequence[Attack], seed: int, **rules: bool) -> tuple[Tensor, ...]:
    """Shares `[n]` in the worst view and in the whole image alone, and for each pair the attack that planted it."""
    done = attacks.poison(train, test, crew, seed)
    images = torch.from_numpy(done.store.images).permute(0, 3, 1, 2)
    distinct, caption_of = np.unique(np.asarray(done.store.captions, dtype=object), return_inverse=True)
    tokens = open_clip.get_tokenizer("RN50")([str(c) for c in distinct], context_length=32)
    found = evidence.neighbour_evidence(images, tokens, torch.from_numpy(caption_of.astype(np.int64)), **rules)
    planter = {record.key: record.attack for record in done.records}
    return found.own, found.by_view[0], np.array([planter.get(key, "") for key in done.store.keys])


def show(title: str, share: Tensor, kind: np.ndarray, names: Sequence[str]) -> None:
    print(f"\n{title:20s} honest kept   " + "  ".join(f"{name:>14s}" for name in names))
    print(f"{'':20s}     of pairs   " + "  ".join(f"{int((kind == name).sum()):14d}" for name in names))
    values = share.numpy()
    for level in LEVELS:
        leaks = "  ".join(f"{int((values[kind == name] <= level).sum()):14d}" for name in names)
        print(f"  alpha {level:<12} {(values[kind == ''] <= level).mean():11.1%}   {leaks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split = load_emoji(options.corpus, 64, options.hold_out)
    names = [attack.name for attack in PLAIN]
    own, whole, kind = judge(split.train, split.test, PLAIN, options.seed)
    show("all rules", own, kind, names)
    show("whole image only", whole, kind, names)
    own, whole, kind = judge(split.train, split.test, PLAIN, options.seed, share_voice=False)
    show("a vote a voter", own, kind, names)
    show("neither", whole, kind, names)
    own, whole, kind = judge(split.train, split.test, ADAPTIVE, options.seed)
    names = [attack.name for attack in ADAPTIVE]
    show("adaptive, all rules", own, kind, names)
    show("whole image only", whole, kind, names)


if __name__ == "__main__":
    main()
