"""What is each constant and each view of `otcclip` worth? One of them changed, one training.

    .venv/bin/python recipes/ablation.py epsilon=.03 --seed 0 --out runs/ablation
    .venv/bin/python recipes/ablation.py evidence-views=whole --attacks tiled mixed-captions mimicry jittered --seed 0

What is an option of the defence is ablated by `otcclip bench --defenses otcclip:grow=false`; this is for what is not
one, because nobody who trains should have to set it. Prints a line: accuracy, attack success, what is in force at the
end. A finished training is not repeated. One training takes six minutes.

    nothing                   as it is
    epsilon=X                 entropic regularisation of transport, in the judge and in the alignment loss (.1)
    p-value=share             the share of captions that fare as well in the worst view, as it is, is the p-value
    targets=own               no caption is right but the own one; what is smoothed stays smoothed
    evidence-views=whole      look-alikes vote on whole images, not on the worst of thirteen views
    evidence-views=windows    and on nine windows removed in turn
    evidence-views=bands      and on three bands of frequencies
    voices=each               every look-alike has a vote, not every caption
    rate=one                  one threshold alpha for all pairs, not a false discovery rate a caption
    measure=none              a claim may hold any number of pairs
    words=none                no word has to be heard from look-alikes
    copies=none               altered copies are no copies
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otcclip.cli import guarded
from otcclip.defenses import otcclip as defense
from otcclip.defenses.base import PairBatch
from otcclip.defenses.losses import smoothed
from otcclip.errors import UserError
from otcclip.evidence import belief, matching, neighbours
from otcclip.training.experiment import RunSpec, run_experiment

PLAIN = ("badnets", "blended", "sig", "clean-label", "targeted")
VIEWS = {"whole": ("whole",), "windows": ("whole", "without"), "bands": ("whole", "low", "high", "fine")}


def _put(module: Any, name: str, value: Any) -> None:
    """`module.name = value`, where there is one: what was renamed would be ablated by nothing."""
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} to ablate")
    setattr(module, name, value)


def _epsilon(value: str) -> None:
    try:
        epsilon = float(value)
    except ValueError:
        raise UserError(f"epsilon={value}: not a number") from None
    _put(matching, "EPSILON", epsilon)


def _p_value(value: str) -> None:
    _put(belief, "p_value", lambda share, by_chance: share)


def _targets(value: str) -> None:
    def own(self: defense.OTCClip, batch: PairBatch) -> Tensor:
        return smoothed(torch.eye(len(batch.tokens), device=batch.tokens.device), self.smoothing)

    _put(defense.OTCClip, "_targets", own)


def _evidence_views(value: str) -> None:
    wanted = tuple(view for view in neighbours.views() if view.name.split()[0] in VIEWS[value])
    _put(neighbours, "views", lambda: wanted)


def _voices(value: str) -> None:
    _put(belief, "neighbour_evidence", partial(neighbours.neighbour_evidence, share_voice=False))


def _rate(value: str) -> None:
    _put(belief, "believed", lambda p, caption_of, agreement, alpha: p <= alpha)


def _measure(value: str) -> None:
    _put(belief, "in_measure", lambda candidates, *rest: candidates)


def _words(value: str) -> None:
    _put(belief, "rarely_unheard", lambda candidates, *rest: candidates)
    _put(neighbours, "doubtful", lambda words, much, caption_of, *rest: torch.zeros(len(caption_of), dtype=torch.bool))


def _copies(value: str) -> None:
    def none(*anything: Any) -> tuple[Tensor, Tensor, Tensor]:
        nobody = torch.zeros(0, dtype=torch.int64)
        return nobody, nobody, nobody.bool()

    _put(neighbours, "copies", none)


CHANGES: dict[str, tuple[Callable[[str], None], tuple[str, ...]]] = {
    "epsilon": (_epsilon, ()),
    "p-value": (_p_value, ("share",)),
    "targets": (_targets, ("own",)),
    "evidence-views": (_evidence_views, tuple(VIEWS)),
    "voices": (_voices, ("each",)),
    "rate": (_rate, ("one",)),
    "measure": (_measure, ("none",)),
    "words": (_words, ("none",)),
    "copies": (_copies, ("none",)),
}


def change(text: str) -> None:
    """Apply `NAME=VALUE` to this process; "nothing" applies nothing.

    Raises:
        UserError: no such change, or no such value of it.
    """
    if text == "nothing":
        return
    name, _, value = text.partition("=")
    if name not in CHANGES or (CHANGES[name][1] and value not in CHANGES[name][1]):
        known = ", ".join(f"{key}={'|'.join(values) or 'X'}" for key, (_, values) in CHANGES.items())
        raise UserError(f"{text}: not a change; those there are: nothing, {known}")
    CHANGES[name][0](value)


def add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What corpus a recipe's run trains on, and where it goes."""
    parser.add_argument("--attacks", nargs="+", default=list(PLAIN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--out", default=out)


def corpus_folder(options: argparse.Namespace) -> Path:
    """Where the runs on one poisoned corpus go."""
    return Path(options.out, "+".join(options.attacks), f"seed-{options.seed}")


def train(name: str, folder: Path, defense: str, options: argparse.Namespace) -> None:
    """Train one run of `add_run_options` and print its line."""
    spec = RunSpec(
        options.corpus,
        str(folder),
        defense,
        hold_out=options.hold_out,
        seed=options.seed,
        attacks=tuple(options.attacks),
        threads=1,
    )
    result = run_experiment(spec)
    rates = ", ".join(f"{attack} {100 * one['asr']:.1f}" for attack, one in result["attacks"].items())
    print(
        f"{name} seed {options.seed}: top-1 {100 * result['top1']:.1f}, top-5 {100 * result['top5']:.1f}; "
        f"ASR {rates}; {result['pairs_kept']} pairs in force, of poison {result['poison_kept']}; "
        f"{result['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("change")
    add_run_options(parser, "runs/ablation")
    options = parser.parse_args()
    change(options.change)
    train(options.change, corpus_folder(options) / options.change, "otcclip", options)


if __name__ == "__main__":
    sys.exit(guarded(main))
