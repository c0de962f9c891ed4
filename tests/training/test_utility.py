"""Measures of a finished run: what they read, what they add, and what is said where a corpus is not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otcclip.data import PairStore
from otcclip.data.emoji_load import load_emoji, read_groups
from otcclip.errors import UserError
from otcclip.evaluation.probe import halves
from otcclip.models.two_tower import Features
from otcclip.training import utility
from otcclip.training.experiment import RunSpec, run_experiment
from otcclip.training.utility import MEASURES, Subject, add_utility, check_measures, missing_measures
from otcclip.transport import FeatureSets

pytestmark = pytest.mark.usefixtures("quiet")


class Reader(nn.Module):
    """Sees an image's number in its first pixel, reads a caption's number in its text, except that it takes every
    tenth image for the next one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.n, self.image_size = n, 8

    def tokenize(self, captions: tuple[str, ...]) -> Tensor:
        return torch.tensor([[int(caption.split()[0])] for caption in captions])

    def image(self, images: Tensor) -> Features:
        number = (images[:, 0, 0, 0] * 255).round().long()
        return self._features(torch.where(number % 10 == 0, (number + 1) % self.n, number))

    def text(self, tokens: Tensor) -> Features:
        return self._features(tokens[:, 0])

    def _features(self, number: Tensor) -> Features:
        pooled = F.one_hot(number, self.n).float()
        return Features(pooled, FeatureSets.from_dense(pooled[:, None]))


def numbered(n: int, labels: list[str]) -> PairStore:
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3)).copy()
    return PairStore(tuple(f"k{i}" for i in range(n)), images, tuple(f"{i} thing" for i in range(n)), tuple(labels))


def test_openclipart_is_retrieved_by_title_and_probed_by_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 100
    store = numbered(n, ["even" if i % 2 == 0 else "odd" for i in range(n - 5)] + ["small"] * 5)
    monkeypatch.setattr(utility, "load_openclipart", lambda folder, size: store)
    found = MEASURES["openclipart"](Subject(Reader(n).eval(), Path("corpora/emoji"), None))  # type: ignore[arg-type]
    assert found.keys() == {"text_at_1", "text_at_5", "image_at_1", "image_at_5", "probe"}
    assert found["text_at_1"].value == pytest.approx(0.9) and found["text_at_1"].n == n
    # One image in ten lies on another's place: the text of the former finds nothing, that of the latter two.
    assert found["image_at_1"].value == pytest.approx(0.8)
    # The five of a folder too small are no class of the probe, and only one half is tested.
    kept = [title for title, label in zip(store.captions, store.labels, strict=True) if label != "small"]
    assert found["probe"].n == int((~halves(kept)).sum())


def test_the_probe_reads_groups_of_the_held_out_style_alone(small_emoji: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are made up here (the small corpus has one): by first letter. The images are the held-out style's."""
    test = load_emoji(small_emoji, 8, "twemoji").test
    groups = {key: "early" if label < "h" else "late" for key, label in zip(test.keys, test.labels, strict=True)}
    seen: list[tuple[tuple[str, ...], Any]] = []
    real = utility.linear_probe

    def note(x: Tensor, y: list[str], other: Tensor, truth: list[str]) -> Any:
        seen.append((tuple(y), tuple(truth)))
        return real(x, y, other, truth)

    monkeypatch.setattr(utility, "read_groups", lambda folder: groups)
    monkeypatch.setattr(utility, "linear_probe", note)
    found = MEASURES["probe"](Subject(Reader(256).eval(), small_emoji, "twemoji"))  # type: ignore[arg-type]
    train = halves(test.labels)
    order = np.array([groups[key] for key in test.keys])
    assert seen == [(tuple(order[train]), tuple(order[~train]))]
    assert found["probe"].n == int((~train).sum()) and 0 < train.sum() < len(train) == 24


def test_images_an_attack_trained_on_are_left_out(small_emoji: Path) -> None:
    test = load_emoji(small_emoji, 8, "twemoji").test
    model: Any = Reader(256).eval()
    model.image_size = 8
    assert Subject(model, small_emoji, "twemoji").test().keys == test.keys
    assert (
        Subject(model, small_emoji, "twemoji", frozenset(test.keys[3:5])).test().keys == test.keys[:3] + test.keys[5:]
    )


def test_read_groups(small_emoji: Path) -> None:
    groups = read_groups(small_emoji)
    split = load_emoji(small_emoji, 8, "twemoji", groups_excluded=())
    assert set(groups) == {*split.train.keys, *split.test.keys} and set(groups.values()) == {
        "objects",
        "symbols",
        "flags",
    }


@pytest.fixture(scope="module")
def spec(small_emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    out = tmp_path_factory.mktemp("runs")
    asked = RunSpec(
        str(small_emoji),
        str(out),
        "clip",
        hold_out="twemoji",
        epochs=1,
        attacks=("badnets:count=9", "targeted:images=2,copies=2"),
    )
    run_experiment(asked)
    return asked


def test_measures_join_the_result_and_are_taken_once(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((spec.folder / "result.json").read_text())
    found = add_utility(spec, ("retrieval",))
    assert json.loads((spec.folder / "result.json").read_text()) == found
    assert {k: v for k, v in found.items() if k != "utility"} == before
    rates = found["utility"]["retrieval"]
    assert before["n"] == 22 and len(before["test_left_out"]) == 2
    assert all(r["low"] <= r["value"] <= r["high"] and r["n"] == 22 for r in rates.values())
    assert missing_measures(found, ("retrieval", "probe")) == ("probe",)
    monkeypatch.setattr(utility, "load_two_tower", None)
    assert add_utility(spec, ("retrieval",)) == found, "taken again"
    assert run_experiment(spec) == found, "a finished run keeps its measures"


def test_a_run_that_is_not_finished(spec: RunSpec) -> None:
    with pytest.raises(UserError, match="no finished run of this spec"):
        add_utility(replace(spec, seed=9), ("retrieval",))


def test_a_corpus_too_small_for_a_probe_is_one_line(spec: RunSpec) -> None:
    with pytest.raises(UserError, match=r"too small for a probe: .*1 classes"):
        add_utility(spec, ("probe",))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("retreival", "unknown utility 'retreival'; did you mean 'retrieval'"),
        ("openclipart", r"no openclipart corpus here; build one with `otcclip corpus openclipart --out"),
        ("fashion-mnist", r"no Fashion-MNIST here; get it with `otcclip corpus fashion-mnist --out"),
    ],
)
def test_what_is_not_there_is_one_line(name: str, says: str, small_emoji: Path) -> None:
    with pytest.raises(UserError, match=says):
        check_measures(("retrieval", name), small_emoji, 64)
