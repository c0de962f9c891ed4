"""Zero-shot classification and retrieval of a model on a user's own pairs, reported in clip_benchmark's shape.

Pairs with a label are classified among the class names given; captions and images are retrieved both ways. A data set
with labels gives two results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from numpy.typing import NDArray

from otcclip.data.index import PairData, open_pairs
from otcclip.data.readers import ReadOptions
from otcclip.errors import UserError
from otcclip.evaluation import NAME_ONLY, Rate, class_embeddings, retrieval, zero_shot
from otcclip.models import TwoTower, create_two_tower, load_two_tower
from otcclip.models.encode import encode_captions, encode_images

TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": NAME_ONLY,
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
}


@dataclass(frozen=True)
class EvalSpec:
    """What to evaluate on.

    Attributes:
        data, dataset_type, options: as for training.
        classnames: file of class names, one a line; without it there is no classification. A label is a class name, or
            a number that counts them from 0; where it could be both, it is the name.
        templates: a key of `TEMPLATES`.
    """

    data: str
    dataset_type: str = "auto"
    classnames: str | None = None
    options: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 4
    templates: str = "name"
    max_bad: float = 0.05
    limit: int | None = None


def load_checkpoint(checkpoint: str, model: str | None) -> TwoTower:
    """The model of a run's folder, a checkpoint's path (with `model`) or an open_clip tag (with `model`).

    Raises:
        UserError: no such checkpoint, no model named for it, or weights that are damaged or another model's.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        try:
            name = str(json.loads((folder / "result.json").read_text("utf-8"))["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no finished run here (no result.json that names its model)") from error
        return load_two_tower(folder, name)
    if model is None:
        raise UserError(f"{checkpoint}: say which --model it is a checkpoint of")
    return create_two_tower(model, checkpoint)


def evaluate_model(model: TwoTower, spec: EvalSpec, cache: Path, pretrained: str) -> list[dict[str, Any]]:
    """Results in clip_benchmark's shape: `dataset, model, pretrained, task, metrics, language`, and `n, intervals`.

    The model is put back into the mode it was in.

    Raises:
        UserError: as `open_evaluation`; or the model's features are not finite.
    """
    data, names, labels = open_evaluation(spec, model.image_size, cache)
    training = model.training
    model.eval()
    try:
        image = encode_images(model, data.images).pooled
        if not bool(image.isfinite().all()):
            raise UserError(f"{pretrained}: features of images are not finite; the training diverged (lower --lr)")
        shared = {"dataset": spec.data, "model": model.name, "pretrained": pretrained, "language": "en"}
        rows = []
        if names:
            rows.append({**shared, **_classify(model, image, labels, names, TEMPLATES[spec.templates])})
        rows.append({**shared, **_retrieve(model, image, data)})
        return rows
    finally:
        model.train(training)


def open_evaluation(
    spec: EvalSpec, image_size: int, cache: Path
) -> tuple[PairData, tuple[str, ...], NDArray[np.int64]]:
    """The pairs, the class names and each pair's class; without `classnames` there are no names and no classes.

    Pairs once opened are opened from `cache` the next time, so a training looks here first, before an epoch is lost.

    Raises:
        UserError: a file cannot be read, no such templates, an option out of range, or a label is no class name.
    """
    if spec.workers < 0:
        raise UserError(f"--workers {spec.workers}: 0 or more")
    names = () if spec.classnames is None else _lines(Path(spec.classnames))
    if spec.templates not in TEMPLATES:
        raise UserError(f"--templates {spec.templates!r}: one of {', '.join(TEMPLATES)}")
    data = open_pairs(
        spec.data,
        spec.dataset_type,
        image_size,
        cache,
        options=spec.options,
        max_bad=spec.max_bad,
        workers=spec.workers,
        limit=spec.limit,
    )
    return data, names, _labels(data, names) if names else np.zeros(0, np.int64)


def _classify(
    model: TwoTower, image: Any, labels: NDArray[np.int64], names: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    def encode(prompts: list[str]) -> Any:
        return encode_captions(model, model.tokenize(prompts)).pooled

    found = zero_shot(image, class_embeddings(encode, names, templates), labels)
    right = found.ranks < 1
    recall = np.mean([right[labels == label].mean() for label in np.unique(labels)])
    metrics = {"acc1": found.top1, "acc5": found.top5, "mean_per_class_recall": float(recall)}
    intervals = {"acc1": _interval(found.rate(1)), "acc5": _interval(found.rate(5))}
    return {"task": "zeroshot_classification", "metrics": metrics, "n": found.n, "intervals": intervals}


def _retrieve(model: TwoTower, image: Any, data: PairData) -> dict[str, Any]:
    """An image that stands in several pairs (COCO has five captions each) is one image with several texts."""
    captions = data.table.captions
    first, owner = data.table.image_numbers()
    distinct, number = data.table.caption_numbers()
    text = encode_captions(model, model.tokenize(distinct)).pooled[number]
    found = retrieval(image[first], text, captions, owner)
    rates = {
        "image_retrieval_recall@1": found.image_at_1,
        "image_retrieval_recall@5": found.image_at_5,
        "text_retrieval_recall@1": found.text_at_1,
        "text_retrieval_recall@5": found.text_at_5,
    }
    return {
        "task": "zeroshot_retrieval",
        "metrics": {name: rate.value for name, rate in rates.items()},
        "n": len(first),
        "intervals": {name: _interval(rate) for name, rate in rates.items()},
    }


def _interval(rate: Rate) -> list[float]:
    return [rate.low, rate.high]


def _labels(data: PairData, names: Sequence[str]) -> NDArray[np.int64]:
    """Each pair's class: its label is a class name, or else a number that counts them from 0."""
    # Names last, so that they win: among the names 1, 2, 3 the label 1 is the first class.
    number = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    labels = data.table.labels
    for key, label in zip(data.table.keys, labels, strict=True):
        if label is None or label not in number:
            what = "has no label" if label is None else f"has label {label!r}, which is not among the class names"
            raise UserError(f"--classnames: pair {key!r} {what}")
    return np.array([number[str(label)] for label in labels])


def _lines(path: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classnames {path}: cannot read: {error}") from error
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"--classnames {path}: expected two or more names, one a line, each once")
    return names
