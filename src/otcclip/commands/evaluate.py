"""`otcclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def evaluate(
    checkpoint: Annotated[str, tyro.conf.Positional],
    data: str,
    dataset_type: str = "auto",
    model: str | None = None,
    classnames: str | None = None,
    templates: str = "name",
    csv_img_key: str | None = None,
    csv_caption_key: str | None = None,
    csv_separator: str = "\t",
    image_root: str | None = None,
    limit: int | None = None,
    max_bad: float = 0.05,
    workers: int = 4,
    cache: Path = Path("logs/.pairs"),
    out: Path | None = None,
) -> None:
    """Zero-shot classification and retrieval of a checkpoint on your own pairs, as JSON in clip_benchmark's shape.

    Args:
        checkpoint: a run's folder, a checkpoint's path, or a tag that open_clip knows.
        data: pairs, as for training.
        dataset_type: auto, webdataset, img2dataset, csv, parquet, coco, visual-genome or hf.
        model: the open_clip model; a run's folder knows its own.
        classnames: file of class names, one a line; the pairs' labels are among them, or else count them from 0.
        templates: prompts around a class name: name, simple or openai.
        csv_img_key: image column of a CSV, Parquet or HF data set.
        csv_caption_key: caption column.
        csv_separator: between the columns of a CSV.
        image_root: folder that relative image paths start from.
        limit: take the first so many pairs alone.
        max_bad: the share of pairs that may be unusable.
        workers: processes that read and decode.
        cache: folder that indexes are kept in.
        out: where to write the JSON; standard output by default.
    """
    import json

    from otcclip.data.atomic import write_json
    from otcclip.data.readers import ReadOptions
    from otcclip.training.evaluate import EvalSpec, evaluate_model, load_checkpoint

    loaded = load_checkpoint(checkpoint, model)
    options = ReadOptions(csv_img_key, csv_caption_key, csv_separator, image_root)
    spec = EvalSpec(data, dataset_type, classnames, options, workers, templates, max_bad, limit)
    rows = evaluate_model(loaded, spec, cache, checkpoint)
    if out is None:
        print(json.dumps(rows, indent=2))
    else:
        write_json(out, rows)
