"""What if pairs of a trigger get through all the same? Some of every attack are believed from the start, by decree.

    .venv/bin/python recipes/leak_probe.py --attacks badnets blended sig tiled wanet --leak 2 --seed 1 --out runs/leak

Evidence before training lets through hardly any pair of most triggers, so a training says little of what comes after
it: whether the model, taught by the pairs that got through, lets in their siblings, and whether they are found out.
Here `leak` pairs of every attack, drawn by the seed, are in force at the start with a p-value of LUCKY. Prints, epoch
by epoch, pairs in force and attack success. One training (six minutes).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from otcclip.cli import guarded
from otcclip.defenses.base import KEEP, TrainingPairs
from otcclip.defenses.otcclip import OTCClip
from otcclip.evidence.belief import Belief
from otcclip.models import open_clip_model_size
from otcclip.training.experiment import RunSpec, make_setting, run_experiment

LUCKY = 1e-4


def leaking(kind: dict[str, str], names: list[str], leak: int, seed: int) -> Any:
    """`OTCClip._start`, after which `leak` pairs of each of `names` are believed."""
    real = OTCClip._start

    def start(self: OTCClip, pairs: TrainingPairs) -> Belief:
        belief = real(self, pairs)
        planted = np.array([kind.get(key, "") for key in pairs.keys])
        for name in names:
            rows = np.random.default_rng(seed).choice(np.flatnonzero(planted == name), leak, replace=False)
            self._action[rows], belief.suspicion[rows] = KEEP, LUCKY
        return belief

    return start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", default=["badnets", "blended", "sig", "tiled", "wanet"])
    parser.add_argument("--leak", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hold-out", default="twemoji")
    parser.add_argument("--corpus", default="corpora/emoji")
    parser.add_argument("--out", default="runs/leak")
    options = parser.parse_args()
    spec = RunSpec(
        options.corpus,
        options.out,
        "otcclip",
        hold_out=options.hold_out,
        seed=options.seed,
        attacks=tuple(options.attacks),
    )
    records = make_setting(spec, open_clip_model_size(spec.model)).records
    names = list(dict.fromkeys(record.attack for record in records))
    kind = {record.key: record.attack for record in records}
    OTCClip._start = leaking(kind, names, options.leak, options.seed)  # type: ignore[method-assign]
    run_experiment(spec)
    for line in (Path(spec.folder) / "history.jsonl").read_text("utf-8").splitlines():
        epoch = json.loads(line)
        rates = {name: f"{rate['asr']:.1%}" for name, rate in epoch.get("attacks", {}).items()}
        print(epoch["epoch"], epoch["kept"], epoch["poison_kept"], rates)


if __name__ == "__main__":
    sys.exit(guarded(main))
