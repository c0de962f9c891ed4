"""Fine-tuning a pre-trained CLIP on COCO captions that may be poisoned, with a defence; one GPU.

    python recipes/coco_ft.py --train-data coco/annotations/captions_train2017.json
    python recipes/coco_ft.py --dry-run

The paper (OTCCLIP, arXiv 2509.18717) reports attack success on MSCOCO; its fine-tuning schedule is not public here, so
every setting is ours. Any model and `--pretrained` that open_clip knows will do, such as
`--set model=ViT-B-32 pretrained=laion2b_s34b_b79k`.
"""

from __future__ import annotations

import sys

from otcclip.training.recipe import Recipe, main
from otcclip.training.train_spec import TrainSpec

RECIPE = Recipe(
    doc=__doc__,
    spec=TrainSpec(
        train_data="coco/annotations/captions_train2017.json",
        dataset_type="coco",
        model="RN50",
        pretrained="openai",
        defense="otcclip",
        batch_size=128,
        epochs=10,
        lr=1e-5,
        wd=0.1,
        warmup=500,
        workers=8,
        name="coco-ft",
    ),
    pairs=591_753,  # captions of train2017, 118,287 images
    processes=1,
    public={"dataset_type": "MSCOCO: the paper's data"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
