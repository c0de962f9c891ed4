"""What the evidence before training costs: CPU seconds of `neighbour_evidence` on the demo's pairs, one thread.

    python benchmarks/evidence.py [--rounds 2] [--corpus corpora/emoji]
    PYTHONPATH=/another/checkout/src python benchmarks/evidence.py      # the same of other code

CPU seconds of this process, so that what else runs says little; the first round, in which numba may compile, is left
out.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import otcclip
from otcclip.defenses.base import training_pairs
from otcclip.evidence.neighbours import neighbour_evidence
from otcclip.models import create_two_tower, open_clip_model_size
from otcclip.training.experiment import RunSpec, make_setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--corpus", default="corpora/emoji")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = RunSpec(options.corpus, "runs", "otcclip", hold_out="twemoji")
    store = make_setting(spec, open_clip_model_size(spec.model)).train
    pairs = training_pairs(store.without_labels(), create_two_tower(spec.model, seed=0))
    seconds = []
    for _ in range(options.rounds + 1):
        start = time.process_time()
        neighbour_evidence(pairs.images, pairs.tokens, pairs.caption_of)
        seconds.append(time.process_time() - start)
    print(f"{otcclip.__file__}: {median(seconds[1:]):.1f} s for {len(pairs):,} pairs ({options.rounds} rounds)")


if __name__ == "__main__":
    main()
