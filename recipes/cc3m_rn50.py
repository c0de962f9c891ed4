"""Pre-training RN50 on Conceptual Captions (CC3M) as WebDataset shards, with a defence; meant for eight GPUs.

    torchrun --nproc-per-node 8 recipes/cc3m_rn50.py --train-data "cc3m/{00000..00331}.tar"
    python recipes/cc3m_rn50.py --dry-run
    python recipes/cc3m_rn50.py --train-data corpora/emoji --limit 64 --set model=otcclip-tiny epochs=1 batch-size=16

The paper (OTCCLIP, arXiv 2509.18717) pre-trains on poisoned web pairs; its schedule and constants are not public here
and none of ours is presented as its own. `img2dataset` makes the shards from CC3M's list of addresses.
"""

from __future__ import annotations

import sys

from otcclip.training.recipe import Recipe, main
from otcclip.training.train_spec import TrainSpec

RECIPE = Recipe(
    doc=__doc__,
    spec=TrainSpec(
        train_data="cc3m/{00000..00331}.tar",
        dataset_type="webdataset",
        model="RN50",
        defense="otcclip",
        batch_size=128,
        epochs=32,
        lr=5e-4,
        wd=0.2,
        warmup=2000,
        workers=8,
        name="cc3m-rn50",
    ),
    pairs=3_318_333,  # Sharma et al., 2018: the training split; what can still be downloaded is less
    processes=8,
    public={},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
