"""What a finished model is good for, as its users would measure it: one protocol a measure, a 95 % interval each.

    add_utility(spec, ("probe", "retrieval"))      # a finished run; result.json gains `utility`

Every image that is measured on was never trained on, poisoned or not: the style held out, less the images that an
attack adds to training (`test_left_out` of the run's result), or another corpus. Figures are taken from the files of a
finished run, so a measure asked for later costs no training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from otcclip.data.atomic import write_json
from otcclip.data.emoji_load import load_emoji, read_groups
from otcclip.data.fashion_mnist import load_fashion_mnist
from otcclip.data.openclipart import load_openclipart
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.evaluation.intervals import Rate
from otcclip.evaluation.probe import halves, linear_probe
from otcclip.evaluation.retrieval import retrieval
from otcclip.models import TwoTower, load_two_tower
from otcclip.models.encode import encode_captions, encode_images
from otcclip.registry import did_you_mean
from otcclip.training.experiment import finished_result
from otcclip.training.setting import RunSpec

Rates = dict[str, Rate]
SMALLEST_CLASS = 20  # images of an openclipart folder, for its name to be a class of the probe
FASHION_TRAINED = 10_000  # photographs the probe is trained on: the first of the official training part


@dataclass(frozen=True)
class Subject:
    """A finished model and where its corpora are; `corpus` is the emoji corpus, others lie beside it. `left_out`: keys
    of test images that it may have been trained on."""

    model: TwoTower
    corpus: Path
    hold_out: str | None
    left_out: frozenset[str] = frozenset()

    def beside(self, name: str) -> Path:
        return self.corpus.parent / name

    def test(self) -> PairStore:
        """The held-out style's pairs, less those left out."""
        test = load_emoji(self.corpus, self.model.image_size, self.hold_out).test
        return test.take([i for i, key in enumerate(test.keys) if key not in self.left_out])

    def images(self, images: NDArray[np.uint8]) -> Tensor:
        return encode_images(self.model, torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).pooled

    def captions(self, captions: tuple[str, ...]) -> Tensor:
        return encode_captions(self.model, self.model.tokenize(captions)).pooled


def probe(subject: Subject) -> Rates:
    """The emojibase group (people, food, ...) of the held-out style's images; no name is in both halves."""
    test, group_of = subject.test(), read_groups(subject.corpus)
    return _probe_halves(subject, test, [group_of[key] for key in test.keys], test.labels)


def retrieve(subject: Subject) -> Rates:
    """The held-out style's images and their own captions, as they stand in the corpus."""
    return _retrieval(subject, subject.test())


def openclipart(subject: Subject) -> Rates:
    """Another corpus: drawings and their titles, and a probe on the folder they are filed under."""
    store = load_openclipart(subject.beside("openclipart"), subject.model.image_size)
    filed = Counter(store.labels)
    rows = [i for i, label in enumerate(store.labels) if filed[label] >= SMALLEST_CLASS]
    large = store.take(rows)
    return {**_retrieval(subject, store), **_probe_halves(subject, large, list(large.labels), large.captions)}


def fashion_mnist(subject: Subject) -> Rates:
    """Another domain: the ten classes of Fashion-MNIST, trained on 10,000 images and judged on the official test."""
    size, folder = subject.model.image_size, subject.beside("fashion-mnist")
    train = load_fashion_mnist(folder, "train", size, FASHION_TRAINED)
    test = load_fashion_mnist(folder, "t10k", size)
    found = linear_probe(subject.images(train.images), train.labels, subject.images(test.images), test.labels)
    return {"probe": found.accuracy}


MEASURES: Mapping[str, Callable[[Subject], Rates]] = {
    "probe": probe,
    "retrieval": retrieve,
    "openclipart": openclipart,
    "fashion-mnist": fashion_mnist,
}


def check_measures(names: tuple[str, ...], corpus: Path, image_size: int) -> None:
    """Raise UserError for a measure that is none, or whose corpus is not built; says how to build it."""
    for name in names:
        if name not in MEASURES:
            raise UserError(f"unknown utility {name!r}{did_you_mean(name, MEASURES)}; there are: {', '.join(MEASURES)}")
    if "openclipart" in names:
        load_openclipart(corpus.parent / "openclipart", image_size)
    if "fashion-mnist" in names:
        load_fashion_mnist(corpus.parent / "fashion-mnist", "t10k", image_size, 1)


def missing_measures(result: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `names` that a run's result lacks."""
    return tuple(name for name in names if name not in result.get("utility", {}))


def add_utility(spec: RunSpec, names: tuple[str, ...]) -> dict[str, Any]:
    """Take what is missing of the measures `names` of a finished run, write them into its `result.json`; the result.

    `utility: {measure: {figure: {value, n, low, high}}}`.

    Raises:
        UserError: the run is not finished, or a corpus is not there.
    """
    result = finished_result(spec)
    if result is None:
        raise UserError(f"{spec.folder}: no finished run of this spec; train it first")
    missing = missing_measures(result, names)
    if not missing:
        return result
    torch.set_num_threads(spec.threads)
    model, left_out = load_two_tower(spec.folder, spec.model).eval(), frozenset(result["test_left_out"])
    subject = Subject(model, Path(spec.corpus), spec.hold_out, left_out)
    taken = {name: {k: asdict(rate) for k, rate in MEASURES[name](subject).items()} for name in missing}
    result = {**result, "utility": {**result.get("utility", {}), **taken}}
    write_json(spec.folder / "result.json", result)
    return result


def _retrieval(subject: Subject, store: PairStore) -> Rates:
    found = retrieval(subject.images(store.images), subject.captions(store.captions), store.captions)
    return {
        "text_at_1": found.text_at_1,
        "text_at_5": found.text_at_5,
        "image_at_1": found.image_at_1,
        "image_at_5": found.image_at_5,
    }


def _probe_halves(subject: Subject, store: PairStore, classes: list[str], names: tuple[str, ...]) -> Rates:
    """Trained on one half of the images, judged on the other; a name is in one half only."""
    features, train, label = subject.images(store.images), halves(names), np.array(classes)
    try:
        found = linear_probe(features[train], label[train].tolist(), features[~train], label[~train].tolist())
    except ValueError as error:
        raise UserError(f"this corpus is too small for a probe: {error}") from error
    return {"probe": found.accuracy}
