"""Scan with encoders that never saw the pairs, repair, and train on what is left: does an attack get through?

    .venv/bin/python recipes/scan_then_train.py --attacks badnets blended sig clean-label targeted --seed 0
    .venv/bin/python recipes/scan_then_train.py --attacks tiled mixed-captions mimicry jittered --loss otcclip

Poisons the corpus as the matrix does (`otcclip poison`), scans it with the trusted encoders at 128 pixels, repairs by
the default rule, and trains for as many steps as the undefended run, with the loss of CLIP or of `otcclip`, whose
judgement is not asked. Prints a line: accuracy, attack success, what is in force. What is finished is not repeated.
Scanning takes three minutes, training four to six. Wants the trusted encoders: pip install -e '.[trusted]'.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import add_run_options, corpus_folder, train

from otcclip.cli import guarded
from otcclip.data.manifest import Manifest, read_manifest
from otcclip.defenses.base import HOLD_BACK, KEEP, REPAIR, Decisions, EpochContext, EpochPlan, TrainingPairs, spread
from otcclip.defenses.clip import Clip
from otcclip.defenses.otcclip import OTCClip
from otcclip.evidence.belief import Belief
from otcclip.training import experiment


def settled(manifest: Manifest, pairs: TrainingPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n]` int8 and `[n]` int64: what is done with each pair, and the caption in force."""
    number = {caption: i for i, caption in enumerate(pairs.captions)}
    action, caption = torch.full((len(pairs),), HOLD_BACK, dtype=torch.int8), pairs.caption_of.clone()
    for i, key in enumerate(pairs.keys):
        own = pairs.captions[int(pairs.caption_of[i])]
        said = manifest.caption(key, own)
        if said is not None:
            action[i], caption[i] = (KEEP if said == own else REPAIR), number[said]
    return action, caption


def defended(manifest: Manifest, loss: str) -> Callable[..., Any]:
    """`make_defense` of a run that trains on what the manifest keeps."""

    class ScannedClip(Clip):
        def begin_epoch(self, context: EpochContext) -> EpochPlan:
            action, caption = settled(manifest, context.pairs)
            return EpochPlan("train", spread(torch.nonzero(action != HOLD_BACK)[:, 0], len(action)), caption)

        def decisions(self, pairs: TrainingPairs) -> Decisions:
            action, caption = settled(manifest, pairs)
            return Decisions(action.numpy(), caption.numpy(), np.full(len(pairs), np.nan))

    class ScannedOTCClip(OTCClip):
        def _start(self, pairs: TrainingPairs) -> Belief:
            self._action, self._caption = settled(manifest, pairs)
            return Belief.gather(pairs.images, pairs.tokens, pairs.caption_of, self.alpha)

    return lambda *name, **options: ScannedClip() if loss == "clip" else ScannedOTCClip(first_refresh=1_000_000)


def scanned(options: argparse.Namespace, folder: Path) -> Path:
    """The manifest of the corpus, poisoned, scanned and repaired under `folder`."""
    pairs, scan, repaired = (folder / name for name in ("pairs", "scan", "repaired"))
    if not pairs.exists():
        split = ["--hold-out", options.hold_out, "--seed", str(options.seed)]
        _otcclip("poison", options.corpus, *split, "--attacks", *options.attacks, "--out", str(pairs))
    if not (scan / "summary.json").exists():
        encoder = ["--encoder", "trusted", "--image-size", "128", "--poison", str(pairs / "poison.parquet")]
        _otcclip("scan", str(pairs), *encoder, "--out", str(scan), *(["--resume"] if scan.exists() else []))
    if not repaired.exists():
        _otcclip("repair", str(scan), "--out", str(repaired))
    return repaired / "manifest.parquet"


def _otcclip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "otcclip.cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, "runs/scanned")
    parser.add_argument("--loss", choices=("clip", "otcclip"), default="clip")
    options = parser.parse_args()
    folder = corpus_folder(options)
    experiment.make_defense = defended(read_manifest(scanned(options, folder)), options.loss)
    train(f"scan, then {options.loss},", folder / options.loss, options.loss, options)


if __name__ == "__main__":
    sys.exit(guarded(main))
