"""Fine-tuning a pre-trained CLIP on Visual Genome's region phrases that may be poisoned, with a defence; one GPU.

    python recipes/visual_genome_ft.py --train-data vg/region_descriptions.json
    python recipes/visual_genome_ft.py --dry-run

Each phrase goes with its own region (`crop_regions`); `--set crop-regions=false` pairs it with the whole image. The
paper (OTCCLIP, arXiv 2509.18717) reports attack success on Visual Genome; how it pairs phrases and images and its
schedule are not public here, so every setting is ours.
"""

from __future__ import annotations

import sys

from otcclip.training.recipe import Recipe, main
from otcclip.training.train_spec import TrainSpec

RECIPE = Recipe(
    doc=__doc__,
    spec=TrainSpec(
        train_data="vg/region_descriptions.json",
        dataset_type="visual-genome",
        crop_regions=True,
        model="RN50",
        pretrained="openai",
        defense="otcclip",
        batch_size=256,
        epochs=3,
        lr=1e-5,
        wd=0.1,
        warmup=500,
        workers=8,
        name="visual-genome-ft",
    ),
    pairs=5_408_689,  # region descriptions of version 1.4, 108,077 images
    processes=1,
    public={"dataset_type": "Visual Genome: the paper's data"},
)

if __name__ == "__main__":
    sys.exit(main(RECIPE))
