"""A matrix from end to end on the small corpus: its files, what is reused, what fails, and newcomers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from otcclip import attacks, defenses
from otcclip.attacks import PoisonContext, PoisonPlan, PoisonRecord, Replacement, read_records
from otcclip.bench import BenchSpec, matrix, run_bench
from otcclip.bench.cell import finished_cell
from otcclip.bench.plan import Cell, plan
from otcclip.defenses import Clip
from otcclip.errors import UserError
from otcclip.evaluation.intervals import wilson
from otcclip.registry import registry

pytestmark = pytest.mark.usefixtures("one_process")
GROUP = "badnets:count=20+targeted:copies=5,images=4"
WEIGHTS = "open_clip_model.safetensors"


def bench_of(corpus: Path, out: Path, **changed: Any) -> BenchSpec:
    asked = BenchSpec(
        str(corpus), str(out), attacks=(GROUP,), defenses=("cleanclip",), seeds=(0,), target="rocket", epochs=1
    )
    return replace(asked, **changed)


@pytest.fixture(scope="module")
def whole(small_emoji: Path, tmp_path_factory: pytest.TempPathFactory, one_process: None) -> BenchSpec:
    """Two groups and the corpus as it is, under two defences: five trainings, two trials of clean models."""
    asked = bench_of(small_emoji, tmp_path_factory.mktemp("whole"), attacks=(GROUP, "sig:count=20"))
    run_bench(asked)
    return asked


def cells_of(bench: BenchSpec) -> tuple[Cell, ...]:
    return plan(bench, 120)


def timeless(value: Any) -> Any:
    """Without what no two runs share: times, memory, where the weights lie."""
    if not isinstance(value, dict):
        return value
    apart = ("seconds", "peak_memory_mib", "pretrained")
    return {k: timeless(v) for k, v in value.items() if k not in apart}


def test_cell_json(whole: BenchSpec) -> None:
    cells = {(cell.group.label, cell.defense.label): cell for cell in cells_of(whole)}
    assert set(cells) == {("none", "clip")} | {(g, d) for g in (GROUP, "sig:count=20") for d in ("clip", "cleanclip")}
    found = json.loads((cells[GROUP, "clip"].folder / "cell.json").read_text())
    expected = {"attack": GROUP, "defense": "clip", "seed": 0, "n": 20, "poison_rate": None, "epochs": 1}
    # 24 test images, of which the targeted attack adds four to training.
    assert {name: found[name] for name in expected} == expected
    # clip_benchmark's words.
    assert found["dataset"] == "emoji/twemoji" and found["model"] == "otcclip-tiny"
    assert found["task"] == "zeroshot_classification" and found["metrics"].keys() == {"acc1", "acc5"}
    for name, share in found["metrics"].items():
        assert found["intervals"][name] == pytest.approx(wilson(round(20 * share), 20))
    assert found["attacks"].keys() == {"badnets", "targeted"}
    assert found["attacks"]["badnets"]["target"] == "rocket" and found["attacks"]["targeted"]["target"] is None
    assert found["attacks"]["badnets"]["n"] == 23 and found["attacks"]["targeted"]["n"] == 4
    assert found["poison_total"] == {"badnets": 20, "targeted": 20} and found["pairs_total"] == 140
    records = read_records(cells[GROUP, "clip"].folder.parent / "poison.parquet")
    assert len(records) == 40 and {r.attack for r in records} == {"badnets", "targeted"}


def test_time_of_a_fine_tuned_model_holds_the_run_it_started_from(whole: BenchSpec) -> None:
    first, second = (c for c in cells_of(whole) if c.group.label == GROUP)
    base, tuned = (json.loads((cell.folder / "cell.json").read_text()) for cell in (first, second))
    own = json.loads((second.folder / "result.json").read_text())
    assert tuned["defense"] == "cleanclip"
    assert tuned["seconds"] == pytest.approx(own["seconds"] + base["seconds"], abs=0.11)


def test_bench_json(whole: BenchSpec) -> None:
    found = json.loads((Path(whole.out) / "bench.json").read_text())
    assert found["groups"] == {"none": [], GROUP: GROUP.split("+"), "sig:count=20": ["sig:count=20"]}
    assert found["defenses"] == ["clip", "cleanclip"] and found["seeds"] == [0] and found["failures"] == {}
    (call,) = found["calls"]
    assert call["trained"] == 5 and found["wall_seconds"] == call["seconds"] > 0
    assert {p.name for p in Path(whole.out).iterdir() if p.is_file()} == {
        ".lock",
        "bench.json",
        "report.html",
        "matrix.png",
    }


def test_attacks_are_tried_on_the_model_that_saw_no_poison(whole: BenchSpec) -> None:
    for cell in cells_of(whole):
        path = cell.folder / "never_poisoned.json"
        assert path.exists() is (cell.defense.label == "clip" and bool(cell.group.attacks))
        if path.exists():
            found = json.loads(path.read_text())
            rates = json.loads((cell.folder / "cell.json").read_text())["attacks"]
            assert {k: v["n"] for k, v in found["attacks"].items()} == {k: v["n"] for k, v in rates.items()}


def test_finished_cells_keep_no_checkpoint(whole: BenchSpec) -> None:
    """A hundred cells of 94 MB each would fill a disk."""
    assert not list(Path(whole.out).rglob("last.pt")) and len(list(Path(whole.out).rglob(WEIGHTS))) == 5


def test_a_cell_alone_is_the_cell_in_the_matrix(whole: BenchSpec, tmp_path: Path) -> None:
    """Figures, poison and weights, to the last bit."""
    alone = replace(whole, out=str(tmp_path), attacks=(GROUP,), reference=False)
    run_bench(alone)
    mine, theirs = ({c.name: c for c in cells_of(bench)} for bench in (alone, whole))
    assert len(mine) == 2
    for name, cell in mine.items():
        other = theirs[name]
        one, two = (json.loads((c.folder / "cell.json").read_text()) for c in (cell, other))
        assert timeless(one) == timeless(two)
        for file in (WEIGHTS, "../poison.parquet"):
            assert (cell.folder / file).read_bytes() == (other.folder / file).read_bytes()


def test_a_second_call_trains_nothing_and_a_wider_one_what_is_new(
    whole: BenchSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[str] = []
    real = matrix.run_cell

    def note(cell: Cell) -> dict[str, Any]:
        trained.append(cell.name)
        return real(cell)

    monkeypatch.setattr(matrix, "run_cell", note)
    before = {path: path.stat().st_mtime_ns for path in Path(whole.out).rglob("cell.json")}
    results = run_bench(whole)
    assert trained == [] and len(results) == 5
    assert {path: path.stat().st_mtime_ns for path in Path(whole.out).rglob("cell.json")} == before
    narrow = run_bench(replace(whole, attacks=("sig:count=20",), defenses=("clip",), reference=False))
    assert trained == [] and [found["attack"] for found in narrow] == ["sig:count=20"]
    bench = json.loads((Path(whole.out) / "bench.json").read_text())
    assert GROUP in bench["groups"] and len(bench["calls"]) == 3, "what was there stays in the page"
    assert bench["wall_seconds"] == pytest.approx(sum(call["seconds"] for call in bench["calls"]), abs=0.2)


def test_a_measure_asked_for_later_costs_no_training(whole: BenchSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("otcclip.training.experiment.Trainer", never)
    asked = replace(whole, attacks=(GROUP,), defenses=("clip",), reference=False, utility=("retrieval",))
    (cell,) = cells_of(asked)
    assert finished_cell(cell) is None, "it lacks a measure"
    (found,) = run_bench(asked)
    assert found["utility"]["retrieval"].keys() == {"text_at_1", "text_at_5", "image_at_1", "image_at_5"}
    assert found["utility"]["retrieval"]["image_at_5"]["n"] == 20
    assert "Image by text, R@5" in (Path(whole.out) / "report.html").read_text()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epochs": 2}, "holds a matrix with epochs 1, this one has 2; name another --out"),
        ({"hold_out": "openmoji"}, "holds a matrix with dataset emoji/twemoji, this one has emoji/openmoji"),
        ({"target": "banana"}, "holds a matrix with target rocket"),
    ],
)
def test_a_folder_is_of_one_setting(whole: BenchSpec, changed: dict[str, Any], says: str) -> None:
    """Else a longer run would silently throw away what took a night."""
    with pytest.raises(UserError, match=says):
        run_bench(replace(whole, **changed))
    assert all(finished_cell(cell) is not None for cell in cells_of(whole))


def test_a_folder_of_something_else(small_emoji: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"years": "of work"}')
    with pytest.raises(UserError, match="not a matrix of otcclip; name another --out"):
        run_bench(bench_of(small_emoji, tmp_path))
    assert (tmp_path / "bench.json").read_text() == '{"years": "of work"}'


@dataclass(frozen=True)
class ToyAttack:
    """One inverted pixel means `target`: a newcomer's one file."""

    target: str
    count: int = 12
    name: str = "toy-attack"
    has_trigger: ClassVar[bool] = True

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        corpus.require_name(self.name, self.target)
        train = corpus.train
        rows = [i for i, label in enumerate(train.labels) if label != self.target][: self.count]
        return PoisonPlan(
            self.name,
            self.target,
            tuple(Replacement(train.keys[i], self.target) for i in rows),
            (),
            tuple(
                PoisonRecord(
                    corpus.train.keys[i], self.name, "pixel", "0,0", self.target, seed, corpus.train.captions[i]
                )
                for i in rows
            ),
            corpus.backdoor_trial(self.name, self.target),
        )

    def trigger(self, images: torch.Tensor) -> torch.Tensor:
        out = images.clone()
        out[..., 0, 0] = 1 - out[..., 0, 0]
        return out


class ToyDefense(Clip):
    """Trains on all pairs but the first few: a newcomer's one file."""

    name = "toy-defence"

    def __init__(self, skip: int = 1) -> None:
        super().__init__()
        self.skip = skip

    def begin_epoch(self, context: Any) -> Any:
        return replace(super().begin_epoch(context), index=torch.arange(self.skip, len(context.pairs)))


@pytest.fixture
def newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One registry line each."""
    widened: Mapping[str, Any] = registry("attack", (*attacks.ATTACKS.values(), ToyAttack))
    monkeypatch.setattr(attacks, "ATTACKS", widened)
    monkeypatch.setattr(defenses, "DEFENSES", registry("defence", (*defenses.DEFENSES.values(), ToyDefense)))


def test_newcomers_are_a_row_and_a_column(newcomers: None, small_emoji: Path, tmp_path: Path) -> None:
    asked = bench_of(
        small_emoji, tmp_path, attacks=("toy-attack:count=7",), defenses=("toy-defence:skip=3",), reference=False
    )
    found = {cell["defense"]: cell for cell in run_bench(asked)}
    assert found.keys() == {"clip", "toy-defence:skip=3"}
    for cell in found.values():
        assert cell["attacks"]["toy-attack"]["n"] == 23 and cell["poison_total"] == {"toy-attack": 7}
        assert cell["attacks"]["toy-attack"]["target"] == "rocket"
    page = (tmp_path / "report.html").read_text()
    assert "toy-attack" in page and "toy-defence:skip=3" in page


class Refuses(ToyDefense):
    name = "refuses"

    def begin_epoch(self, context: Any) -> Any:
        raise UserError("nothing here can be trusted")


def test_a_cell_that_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, small_emoji: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(defenses, "DEFENSES", registry("defence", (*defenses.DEFENSES.values(), Refuses)))
    asked = bench_of(small_emoji, tmp_path, defenses=("refuses", "clip"), reference=False)
    with pytest.raises(UserError, match=r"1 of 2 jobs failed; .*refuses · seed 0: nothing here can be trusted"):
        run_bench(asked)
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert list(bench["failures"].values()) == ["nothing here can be trusted"]
    assert len(list(tmp_path.rglob("cell.json"))) == 1
    assert "nothing here can be trusted" in (tmp_path / "report.html").read_text()
    # Mended, the next call has nothing to tell.
    monkeypatch.setattr(Refuses, "begin_epoch", ToyDefense.begin_epoch)
    assert len(run_bench(asked)) == 2
    assert json.loads((tmp_path / "bench.json").read_text())["failures"] == {}


def test_a_trial_that_failed_is_told_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch, small_emoji: Path, tmp_path: Path
) -> None:
    def refuses(*_: object) -> dict[str, Any]:
        raise UserError("disk full")

    asked = bench_of(small_emoji, tmp_path, attacks=("badnets:count=9",), defenses=("clip",))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 of 3 jobs failed"):
        patch.setattr(matrix, "try_never_poisoned", refuses)
        run_bench(asked)

    def failures() -> dict[str, str]:
        found: dict[str, str] = json.loads((tmp_path / "bench.json").read_text())["failures"]
        return found

    failed = {"badnets:count=9 · clip · seed 0 · never poisoned": "disk full"}
    assert failures() == failed
    run_bench(replace(asked, reference=False))
    assert failures() == failed, "this call had no such trial to do"
    run_bench(asked)
    assert failures() == {}


def test_a_finished_cell_of_another_patch_is_refused_and_not_deleted(small_emoji: Path, tmp_path: Path) -> None:
    patch = tmp_path / "patch.npy"
    np.save(patch, np.zeros((3, 12, 12), np.float32))
    asked = bench_of(
        small_emoji, tmp_path / "out", attacks=(f"badclip:count=9,patch={patch}",), defenses=("clip",), reference=False
    )
    run_bench(asked)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    np.save(patch, np.ones((3, 12, 12), np.float32))
    with pytest.raises(UserError, match=r"holds a finished run of another spec \(other files\): name another --out"):
        run_bench(asked)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_white_box_attacks_need_nothing_but_their_names(
    monkeypatch: pytest.MonkeyPatch, small_emoji: Path, tmp_path: Path
) -> None:
    """The model looked into is trained first; a patch is optimised once and laid by every cell."""
    made: list[str] = []

    def quick(target: str, corpus: Any, surrogate: Any, rng: np.random.Generator, *options: Any) -> np.ndarray:
        assert surrogate.image_size == 64
        made.append(target)
        return rng.random((3, 12, 12), dtype=np.float32)

    monkeypatch.setattr("otcclip.attacks.badclip._optimise", quick)
    group = "badclip:count=9+low-ot:count=9,templates=5"
    found = run_bench(bench_of(small_emoji, tmp_path, attacks=(group,), defenses=("clip",), reference=False))
    assert [cell["attack"] for cell in found] == ["none", group] and made == ["rocket"]
    assert found[1]["poison_total"] == {"badclip": 9, "low-ot": 9}
    assert found[1]["attacks"]["badclip"]["target"] == "rocket" != found[1]["attacks"]["low-ot"]["target"]
    assert len(list((tmp_path / "none" / "seed-0" / "clip").glob("badclip-*.npy"))) == 1
