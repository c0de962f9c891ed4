"""What a training run is asked to do. Imports nothing heavy: the command line shows its help from here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from otcclip import __version__
from otcclip.data.digest import file_digest
from otcclip.errors import UserError
from otcclip.seeds import check_seed

# What may differ between a run and the one that takes it up again: where it reads and writes, how fast it goes, who
# watches. The pairs themselves must agree (`pair_state.contents`), wherever they lie and however they are sharded.
FREE = (
    *("train_data", "dataset_type", "csv_img_key", "csv_caption_key", "csv_separator", "image_root", "limit"),
    *("logs", "name", "report_to", "resume", "save_seconds", "device", "threads", "workers", "decoded_gib", "max_bad"),
    *("val_data", "val_classnames", "val_frequency", "batch_size", "accum_freq"),
)


@dataclass(frozen=True)
class TrainSpec:
    """Settings of a run, named as open_clip's flags are; batch size and warm-up mean what they mean there."""

    train_data: str
    """Shards ("{00000..00041}.tar", joined by "::"), a file or a folder, or fsspec addresses."""
    dataset_type: str = "auto"
    """auto, webdataset, img2dataset, csv, parquet, coco, visual-genome or hf."""
    csv_img_key: str | None = None
    """Image column of a CSV (filepath), Parquet or HF data set."""
    csv_caption_key: str | None = None
    """Caption column of a CSV (title), Parquet or HF data set."""
    csv_separator: str = "\t"
    """Between the columns of a CSV."""
    image_root: str | None = None
    """Folder that relative image paths start from."""
    crop_regions: bool = False
    """Visual Genome: each phrase with its region alone."""
    max_bad: float = 0.05
    """The share of pairs that may be unusable; they are listed in skipped.parquet."""
    limit: int | None = None
    """Take the first so many pairs alone."""
    manifest: str | None = None
    """A scan's manifest: drop and re-pair as it says."""
    model: str = "RN50"
    """An open_clip model."""
    pretrained: str | None = None
    """An open_clip tag or a checkpoint's path to start from."""
    defense: str = "otcclip"
    """name[:option=value,...]"""
    trusted: str | None = None
    """A file of keys, one a line, of pairs that somebody vouches for; fine-tuning defences need it."""
    batch_size: int = 64
    """Pairs that a process encodes at once; a step's batch is batch-size x processes x accum-freq."""
    accum_freq: int = 1
    """Chunks in which a process encodes its share; features are cached, the contrastive batch stays whole."""
    epochs: int = 32
    lr: float = 5e-4
    wd: float = 0.2
    warmup: int | None = None
    """Steps over which the learning rate rises; 8 % of the run by default."""
    grad_clip_norm: float = 1.0
    """Largest norm of a step's gradient."""
    precision: str = "amp_bf16"
    """fp32, amp or amp_bf16."""
    grad_checkpointing: bool = False
    """Encode transformer blocks twice instead of keeping what is between them."""
    torchcompile: bool = False
    """Compile the towers' blocks."""
    workers: int = 4
    """Processes that read and decode."""
    decoded_gib: float = 8.0
    """Keep the images decoded when they take no more than this."""
    seed: int = 0
    """Seeds weights, order and augmentation."""
    logs: str = "logs"
    """Folder of runs."""
    name: str | None = None
    """The run's folder in logs; model and defence by default."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, all or none."""
    resume: str | None = None
    """latest: go on from this run's last checkpoint; or a checkpoint's path."""
    save_seconds: float = 300.0
    """Training time between checkpoints; also one after every epoch."""
    val_data: str | None = None
    """Pairs to evaluate on, of the same dataset type."""
    val_classnames: str | None = None
    """File of class names, one a line, for pairs with labels."""
    val_frequency: int = 1
    """Epochs between evaluations."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int | None = None
    """Of torch, in each process; its own choice by default."""

    @property
    def folder(self) -> Path:
        chosen = self.name or f"{self.model}-{self.defense}"
        return Path(self.logs) / chosen.replace("/", "-")

    def check(self) -> None:
        """Raises UserError for a number out of range, or class names without pairs to classify."""
        for name in ("batch_size", "accum_freq", "epochs", "val_frequency", "threads", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")
        if not (self.lr > 0 and self.wd >= 0 and math.isfinite(self.lr)) or (self.warmup or 0) < 0 or self.workers < 0:
            raise UserError("--lr must be positive; --wd, --warmup and --workers 0 or more")
        if not self.grad_clip_norm > 0:  # nan is not
            raise UserError(f"--grad-clip-norm {self.grad_clip_norm}: above 0; inf for no clipping")
        check_seed(self.seed)
        if self.val_classnames is not None and self.val_data is None:
            raise UserError(f"--val-classnames {self.val_classnames}: says nothing without --val-data")

    def global_batch(self, processes: int) -> int:
        """Pairs of a step."""
        return self.batch_size * self.accum_freq * processes

    def identity(self, processes: int) -> dict[str, Any]:
        """What must agree for a checkpoint to be taken up again."""
        spec = {name: value for name, value in asdict(self).items() if name not in FREE}
        contents = {name: file_digest(path) for name in ("manifest", "trusted") if (path := getattr(self, name))}
        return {**spec, **contents, "global_batch": self.global_batch(processes), "version": __version__}
