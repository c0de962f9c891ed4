"""What `otcclip evaluate` and a training's validation read: pairs, class names, and which class a label means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from otcclip.data import Pair, write_shard
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.training.evaluate import EvalSpec, open_evaluation
from otcclip.training.judge import png


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (("1", "2", "3"), ("1", "2", "3", "1"), [0, 1, 2, 0]),
        (("1", "2", "3"), ("0", "1", "2", "3"), [0, 0, 1, 2]),
        (("cat", "1", "dog"), ("0", "1", "2", "dog"), [0, 1, 2, 2]),
        (("2", "1", "0"), ("0", "1", "2", "2"), [2, 1, 0, 0]),
        (("cat", "dog"), ("0", "1", "dog", "cat"), [0, 1, 1, 0]),
    ],
)
def test_a_label_is_a_name_before_it_is_a_number(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    classes: list[int],
    make_store: Callable[..., PairStore],
    tmp_path: Path,
) -> None:
    store = make_store(4, 4)
    rows = zip(store.keys, store.images, store.captions, labels, strict=True)
    write_shard(tmp_path / "0.tar", [Pair(key, png(image), caption, label) for key, image, caption, label in rows])
    (tmp_path / "names.txt").write_text("\n".join(names))
    spec = EvalSpec(str(tmp_path / "0.tar"), classnames=str(tmp_path / "names.txt"), workers=0)
    data, found, numbers = open_evaluation(spec, 64, tmp_path / "cache")
    assert found == names and numbers.tolist() == classes and data.table.labels == labels
    (tmp_path / "names.txt").write_text("cat\nbird")
    if "dog" in labels or "3" in labels:
        with pytest.raises(UserError, match=r"has label '(dog|2|3)', which is not among the class names"):
            open_evaluation(spec, 64, tmp_path / "cache")


def test_fewer_workers_than_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers -1: 0 or more"):
        open_evaluation(EvalSpec(str(tmp_path / "0.tar"), workers=-1), 64, tmp_path / "cache")
