"""How much poison does the evidence let through, before any training? Two minutes instead of a training run.

    .venv/bin/python recipes/evidence_probe.py --hold-out twemoji --seed 0 [--crowds] [--sayings]

Plants attacks, each with a target of its own, and prints the share of honest pairs trusted and the poison pairs among
them: at every level under one threshold for all pairs, with the false discovery rate held by caption
(`trust.believed`) after crowds were judged (`evidence.crowds`), with no word used unheard beyond the usual
(`words.rarely_unheard`), and with no claim beyond the usual measure (`trust.in_measure`). First the plain attacks in
one corpus, under all rules of `evidence/neighbours.py` and with one taken away at a time; then the adaptive attacks
that need no model, in a second corpus; with --crowds also four triggers alone, 460 pairs each (5 % of the corpus). With
--sayings instead a warp that makes its pictures each other's look-alikes, its claim in 1 to 24 sayings, by all rules
and without the one of closed circles (`evidence.circles`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import open_clip
import torch
from torch import Tensor

from otcclip import attacks
from otcclip.attacks import Attack, make
from otcclip.cli import guarded
from otcclip.data.emoji_load import load_emoji
from otcclip.data.pairs import PairStore
from otcclip.defenses import OTCClip
from otcclip.evidence.belief import Belief
from otcclip.evidence.neighbours import Evidence, neighbour_evidence
from otcclip.evidence.trust import believed
from otcclip.evidence.words import rarely_unheard

LEVELS = (0.005, 0.01, 0.02, 0.05)
RATE = OTCClip().alpha

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
SAYINGS = (1, 6, 12, 24)
CROWDS = tuple(make(name, target="banana", count=460) for name in ("badnets", "sig", "filter", "blended"))


@dataclass(frozen=True)
class Judged:
    """A poisoned corpus's evidence, its captions, each pair's, and the attack that planted it (or "")."""

    found: Evidence
    tokens: Tensor
    caption_of: Tensor
    kind: np.ndarray


def judge(train: PairStore, test: PairStore, crew: Sequence[Attack], seed: int, **rules: bool) -> Judged:
    return weigh(*planted(train, test, crew, seed), **rules)


def planted(train: PairStore, test: PairStore, crew: Sequence[Attack], seed: int) -> tuple[PairStore, np.ndarray]:
    """The poisoned corpus, and which attack planted each pair (or "")."""
    done = attacks.poison(train, test, crew, seed)
    planter = {record.key: record.attack for record in done.records}
    return done.store, np.array([planter.get(key, "") for key in done.store.keys])


def weigh(store: PairStore, kind: np.ndarray, **rules: bool) -> Judged:
    images = torch.from_numpy(store.images).permute(0, 3, 1, 2)
    distinct, number = np.unique(np.asarray(store.captions, dtype=object), return_inverse=True)
    tokens = open_clip.get_tokenizer("RN50")([str(c) for c in distinct], context_length=32)
    caption_of = torch.from_numpy(number.astype(np.int64))
    return Judged(neighbour_evidence(images, tokens, caption_of, **rules), tokens, caption_of, kind)


def in_sayings(store: PairStore, kind: np.ndarray, number: int, drowned: bool, seed: int) -> PairStore:
    """Planted captions, all of one name, in `number` sayings: the name, its keywords and two of all at random; or,
    `drowned`, the name and five at random."""
    rng = np.random.default_rng(seed)
    keywords = sorted({word for caption in store.captions for word in caption.split(" | ")[1].split(", ")})
    rows = np.flatnonzero(kind != "")
    name, own = store.captions[rows[0]].split(" | ")
    chosen = [list(rng.choice(keywords, 5 if drowned else 2, replace=False)) for _ in range(number)]
    sayings = [f"{name} | {', '.join(words if drowned else [own, *words])}" for words in chosen]
    captions = list(store.captions)
    for place, row in enumerate(rows.tolist()):
        captions[row] = sayings[place % number]
    return replace(store, captions=tuple(captions))


def show_sayings(train: PairStore, test: PairStore, seed: int) -> None:
    store, kind = planted(train, test, (make("wanet", target="cactus"),), seed)
    print(f"\nwarped pictures of one claim, {int((kind != '').sum())} pairs: believed (and honest ones)")
    for number in SAYINGS:
        for drowned in (False, True):
            judged = weigh(in_sayings(store, kind, number, drowned, seed), kind)
            found, line = judged.found, []
            opened = replace(found, encircled=found.encircled & False, outside=torch.zeros_like(found.outside))
            for evidence in (opened, found):
                kept = Belief.of(evidence, judged.tokens, judged.caption_of, RATE).trusted().numpy()
                line.append(f"{int(kept[kind != ''].sum()):4d} ({kept[kind == ''].mean():.1%})")
            how = "five other words" if drowned else "its keywords and two"
            print(f"  {number:3d} sayings, {how:20s}  circles open {line[0]}   closed {line[1]}")


def show(title: str, judged: Judged, names: Sequence[str], share: Tensor | None = None) -> None:
    """A line a level under one threshold; for the worst view also the two rules of `evidence.trust`."""
    found, kind = judged.found, judged.kind
    values = found.own if share is None else share
    print(f"\n{title:24s} honest kept   " + "  ".join(f"{name:>14s}" for name in names))
    print(f"{'':24s}     of pairs   " + "  ".join(f"{int((kind == name).sum()):14d}" for name in names))

    def line(label: str, trusted: Tensor) -> None:
        kept = trusted.numpy()
        leaks = "  ".join(f"{int(kept[kind == name].sum()):14d}" for name in names)
        print(f"  {label:22s} {kept[kind == ''].mean():11.1%}   {leaks}")

    for level in LEVELS:
        line(f"one threshold {level}", values <= level)
    if share is None:
        belief = Belief.of(found, judged.tokens, judged.caption_of, RATE)
        p, caption_of = belief.suspicion, judged.caption_of
        chosen = believed(p, caption_of, found.agreement, RATE)
        line(f"rate {RATE} by caption", chosen)
        chosen = rarely_unheard(chosen & ~found.doubtful, p, caption_of, found.words, found.unheard)
        line("  word for word", chosen)
        line("  and in measure", belief.trusted())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crowds", action="store_true")
    parser.add_argument("--sayings", action="store_true")
    options = parser.parse_args()
    split = load_emoji(options.corpus, 64, options.hold_out)
    if options.sayings:
        show_sayings(split.train, split.test, options.seed)
        return
    names = [attack.name for attack in PLAIN]
    judged = judge(split.train, split.test, PLAIN, options.seed)
    show("all rules", judged, names)
    show("whole image only", judged, names, judged.found.by_view[0])
    loud = judge(split.train, split.test, PLAIN, options.seed, share_voice=False)
    show("a vote a voter", loud, names, loud.found.own)
    show("neither", loud, names, loud.found.by_view[0])
    show("adaptive", judge(split.train, split.test, ADAPTIVE, options.seed), [attack.name for attack in ADAPTIVE])
    for attack in CROWDS if options.crowds else ():
        show("a crowd", judge(split.train, split.test, (attack,), options.seed), [attack.name])


if __name__ == "__main__":
    sys.exit(guarded(main))
