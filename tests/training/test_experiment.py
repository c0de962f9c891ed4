"""One run on a small corpus, from shards to the files of docs/formats.md; reused, resumed, begun anew."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from otcclip.defenses import Clip
from otcclip.defenses.base import REPAIR, Decisions, TrainingPairs
from otcclip.errors import UserError
from otcclip.models import load_two_tower
from otcclip.training import experiment, outcome
from otcclip.training.checkpoint import save_state
from otcclip.training.experiment import RunSpec, clean_reference, make_setting, run_experiment

pytestmark = pytest.mark.usefixtures("quiet")

POISON = {"badnets": 90, "targeted": 240}
# As docs/formats.md has them.
# fmt: off
GALLERY_COLUMNS = (
    "attack", "key", "image", "clean_image", "true_name", "target", "clean_prediction", "prediction", "confidence",
)
PAIRS_COLUMNS = ("key", "image", "caption", "new_caption", "action", "suspicion", "attack", "true_name")
# fmt: on
TRAIN = 120 + POISON["targeted"]


def spec_of(corpus: Path, out: Path, **changed: Any) -> RunSpec:
    return replace(RunSpec(str(corpus), str(out), "clip", hold_out="twemoji", epochs=2, batch_size=64), **changed)


@pytest.fixture(scope="module")
def spec(small_emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    return spec_of(small_emoji, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def result(spec: RunSpec) -> dict[str, Any]:
    return run_experiment(spec)


def history_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_result(spec: RunSpec, result: dict[str, Any]) -> None:
    assert json.loads((spec.folder / "result.json").read_text()) == result
    expected = {"defense": "clip", "seed": 0, "epochs": 2, "clean_asr": None, "pairs_total": TRAIN, "pairs_kept": TRAIN}
    assert {name: result[name] for name in expected} == expected
    assert result["poison_total"] == result["poison_kept"] == POISON
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert result["metrics"] == {"acc1": result["top1"], "acc5": result["top5"]}
    assert result["dataset"] == "emoji/twemoji" and result["task"] == "zeroshot_classification"
    assert result["model"] == "otcclip-tiny" and Path(result["pretrained"]).exists()
    assert {name: rate["n"] for name, rate in result["attacks"].items()} == {"badnets": 23, "targeted": 16}
    for rate in result["attacks"].values():
        assert rate["low"] <= rate["asr"] <= rate["high"]


def test_history(spec: RunSpec, result: dict[str, Any]) -> None:
    history = history_of(spec.folder)
    assert [line["epoch"] for line in history] == [0, 1]
    for line in history:
        assert line["phase"] == "train" and np.isfinite(line["loss"]) and line["terms"].keys() == {"clip"}
        assert (line["kept"], line["repaired"], line["held_back"]) == (TRAIN, 0, 0)
        assert line["poison_kept"] == POISON and "trust_auroc" not in line
    assert history[0]["seconds"] < history[1]["seconds"]
    assert {name: history[-1][name] for name in ("top1", "top5", "attacks")} == {
        name: result[name] for name in ("top1", "top5", "attacks")
    }


def test_gallery(spec: RunSpec, result: dict[str, Any]) -> None:
    rows = pq.read_table(spec.folder / "gallery.parquet").to_pylist()
    assert all(tuple(row) == GALLERY_COLUMNS for row in rows)
    by_attack = {name: [row for row in rows if row["attack"] == name] for name in POISON}
    assert {name: len(found) for name, found in by_attack.items()} == {"badnets": 23, "targeted": 16}
    for name, found in by_attack.items():
        rate = np.mean([row["prediction"] == row["target"] for row in found])
        assert rate == pytest.approx(result["attacks"][name]["asr"])
        for row in found:
            assert row["target"] != row["true_name"]
            same = np.array_equal(picture(row["image"]), picture(row["clean_image"]))
            assert same is (name == "targeted") and picture(row["image"]).shape == (64, 64, 3)


def test_pairs(spec: RunSpec, result: dict[str, Any]) -> None:
    rows = pq.read_table(spec.folder / "pairs.parquet").to_pylist()
    assert all(tuple(row) == PAIRS_COLUMNS for row in rows)
    setting = make_setting(spec, 64)
    assert {(row["key"], row["attack"]) for row in rows} == {(r.key, r.attack) for r in setting.records}
    row_of = {key: i for i, key in enumerate(setting.train.keys)}
    for row in rows[::37]:
        i = row_of[row["key"]]
        assert np.array_equal(picture(row["image"]), setting.train.images[i])
        assert (row["caption"], row["true_name"]) == (setting.train.captions[i], setting.train.labels[i])
        assert row["action"] == "keep" and row["new_caption"] is None and np.isnan(row["suspicion"])


def test_the_model_is_open_clips(spec: RunSpec, result: dict[str, Any]) -> None:
    """And it is the trained one: it answers as the gallery says."""
    model = load_two_tower(spec.folder, "otcclip-tiny").eval()
    plain = open_clip.create_model("otcclip-tiny", pretrained=str(spec.folder / "open_clip_model.safetensors"))
    mine = model.clip.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items())
    names = make_setting(spec, 64).split.names
    with torch.no_grad():
        text = model.text(model.tokenize(list(names))).pooled
    rows = pq.read_table(spec.folder / "gallery.parquet").to_pylist()
    images = torch.from_numpy(np.stack([picture(row["image"]) for row in rows])).permute(0, 3, 1, 2)
    with torch.no_grad():
        said = (model.image(images.float() / 255).pooled @ text.T).argmax(1)
    agree = np.mean([names[k] == row["prediction"] for k, row in zip(said.tolist(), rows, strict=True)])
    assert agree > 0.8  # there in bfloat16, here in float32


def test_tensorboard_and_nothing_left_over(spec: RunSpec, result: dict[str, Any]) -> None:
    assert {p.name for p in spec.folder.iterdir()} == {
        "spec.json",
        "history.jsonl",
        "result.json",
        "gallery.parquet",
        "pairs.parquet",
        "checkpoint",
        "tensorboard",
        "open_clip_model.safetensors",
        "open_clip_config.json",
        "local_head.safetensors",
    }
    assert [p.name for p in (spec.folder / "checkpoint").iterdir()] == ["last.pt"]
    assert list((spec.folder / "tensorboard").glob("events*"))


def test_a_finished_run_is_reused(spec: RunSpec, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "create_two_tower", never)
    assert run_experiment(spec) == result
    assert run_experiment(replace(spec, threads=2)) == result, "how many threads is no part of what a run is"


def test_what_another_spec_left_unfinished_is_begun_anew(
    small_emoji: Path, tmp_path: Path, cut_off: Callable[[RunSpec], None]
) -> None:
    first = spec_of(small_emoji, tmp_path)
    cut_off(first)
    (first.folder / "stale").write_text("of the run before")
    second = replace(first, seed=1, epochs=1)
    assert run_experiment(second)["seed"] == 1
    assert len(history_of(second.folder)) == 1 and not (second.folder / "stale").exists()


@pytest.mark.parametrize("spec_json", ["as it was", "damaged", "gone", "older"])
def test_a_finished_run_of_another_spec_is_never_deleted(
    spec_json: str, spec: RunSpec, result: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(spec.folder, tmp_path / "clip")
    path = tmp_path / "clip" / "spec.json"
    says = {"as it was": "seed 0, not 1, epochs 2, not 1", "older": "of an older version"}
    other = replace(spec, out=str(tmp_path), seed=1, epochs=1)
    if spec_json == "gone":
        path.unlink()
    elif spec_json == "older":
        path.write_text(json.dumps({name: value for name, value in other.identity().items() if name != "files"}))
    elif spec_json == "damaged":
        path.write_text("{")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as raised:
        run_experiment(other)
    why = says.get(spec_json, "its spec.json cannot be read")
    assert str(raised.value) == (
        f"{tmp_path / 'clip'} holds a finished run of another spec ({why}): name another --out, or delete it"
    )
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_that_no_run_made_is_not_cleared(small_emoji: Path, tmp_path: Path) -> None:
    spec = spec_of(small_emoji, tmp_path, epochs=1)
    spec.folder.mkdir(parents=True)
    (spec.folder / "thesis.txt").write_text("years of work")
    run_experiment(spec)
    assert (spec.folder / "thesis.txt").read_text() == "years of work"


def test_a_run_cut_off_goes_on(
    spec: RunSpec, result: dict[str, Any], tmp_path: Path, cut_off: Callable[[RunSpec], None]
) -> None:
    cut = replace(spec, out=str(tmp_path))
    cut_off(cut)
    (before,) = history_of(cut.folder)
    assert not (cut.folder / "result.json").exists()
    again = run_experiment(cut)
    assert history_of(cut.folder)[0] == before, "the first epoch was trained again: its seconds differ"

    def timeless(line: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mib", "pretrained")}

    assert timeless(again) == timeless(result)
    mine, theirs = history_of(cut.folder), history_of(spec.folder)
    assert [timeless(line) for line in mine] == [timeless(line) for line in theirs]
    weights = "open_clip_model.safetensors"
    assert (cut.folder / weights).read_bytes() == (spec.folder / weights).read_bytes()


def test_a_damaged_checkpoint_is_one_line(small_emoji: Path, tmp_path: Path) -> None:
    spec = spec_of(small_emoji, tmp_path)
    experiment.write_json(spec.folder / "spec.json", spec.identity())
    (spec.folder / "checkpoint").mkdir()
    (spec.folder / "checkpoint" / "last.pt").write_bytes(b"half a checkpo")
    with pytest.raises(UserError, match=r"last\.pt: checkpoint cannot be read"):
        run_experiment(spec)


def test_a_defence_that_judges(small_emoji: Path, tmp_path: Path) -> None:
    """Its verdicts are held against the truth: in the history, and in the pairs it distrusted or let through."""
    spec = spec_of(small_emoji, tmp_path, defense="otcclip", options={"alpha": 0.7}, name="loose")
    result = run_experiment(spec)
    assert result["defense"] == "loose" and spec.folder.name == "loose"
    last = history_of(spec.folder)[-1]
    assert last["kept"] + last["repaired"] + last["held_back"] == TRAIN
    assert last["terms"].keys() >= {"clip", "ot"} and last["trust_auroc"].keys() == POISON.keys()
    assert all(0 <= auroc <= 1 for auroc in last["trust_auroc"].values())
    assert (result["pairs_kept"], result["pairs_repaired"]) == (last["kept"], last["repaired"])
    assert result["poison_kept"] == last["poison_kept"]
    rows = pq.read_table(spec.folder / "pairs.parquet").to_pylist()
    count = {action: sum(row["action"] == action for row in rows) for action in ("keep", "re-pair", "hold-back")}
    assert count["keep"] == sum(result["poison_kept"].values()), "of the pairs kept only the poison is shown"
    assert (count["re-pair"], count["hold-back"]) == (last["repaired"], last["held_back"])
    assert all((row["new_caption"] is not None) is (row["action"] == "re-pair") for row in rows)
    assert all(np.isfinite(row["suspicion"]) for row in rows)


class Scripted(Clip):
    """Keeps, re-pairs to the first caption and holds back in turn; suspects poison and honest pairs alike."""

    def decisions(self, pairs: TrainingPairs) -> Decisions:
        action = (np.arange(len(pairs)) % 3).astype(np.int8)
        caption_of = np.where(action == REPAIR, 0, pairs.caption_of.numpy())
        return Decisions(action, caption_of, np.arange(len(pairs)) / len(pairs))


def test_verdicts_are_held_against_the_truth(
    small_emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "make_defense", lambda name: Scripted())
    monkeypatch.setattr(outcome, "SHOWN_PAIRS", sum(POISON.values()) + 7)
    spec = spec_of(small_emoji, tmp_path, epochs=1)
    result = run_experiment(spec)
    train, records = make_setting(spec, 64).train, make_setting(spec, 64).records
    attack_of = {record.key: record.attack for record in records}
    planted = np.array([attack_of.get(key, "") for key in train.keys])
    rows = np.arange(len(train))
    (line,) = history_of(spec.folder)

    assert (line["kept"], line["repaired"], line["held_back"]) == (TRAIN / 3,) * 3
    kept = {name: int(((planted == name) & (rows % 3 == 0)).sum()) for name in POISON}
    assert line["poison_kept"] == result["poison_kept"] == kept
    for name in POISON:
        bad, honest = rows[planted == name], rows[planted == ""]
        assert line["trust_auroc"][name] == pytest.approx((bad[:, None] > honest).mean())
    # Re-paired to the first caption of all: right where the picture is of the thing it names.
    first = min(train.captions)
    assert line["repair_precision"] == pytest.approx(
        np.mean([train.labels[i] == first.split(" | ")[0] for i in rows[rows % 3 == 1]])
    )

    shown = pq.read_table(spec.folder / "pairs.parquet").to_pylist()
    row_of = {key: i for i, key in enumerate(train.keys)}
    assert {row["key"] for row in shown} >= set(attack_of) and len(shown) == len(attack_of) + 7
    for row in shown:
        i = row_of[row["key"]]
        assert row["attack"] == planted[i] and row["suspicion"] == pytest.approx(i / len(train))
        assert row["action"] == ("keep", "re-pair", "hold-back")[i % 3] and (row["attack"] or i % 3)
        assert row["new_caption"] == (first if i % 3 == 1 else None)


def test_the_clean_reference(small_emoji: Path, tmp_path: Path) -> None:
    """The same pairs without poison, tried under the same triggers."""
    spec = clean_reference(spec_of(small_emoji, tmp_path, epochs=1, defense="otcclip-paper"))
    poisoned, clean = make_setting(replace(spec, poisoned=True), 64), make_setting(spec, 64)
    assert clean.plans == poisoned.plans and not clean.records
    assert clean.train.keys == clean.split.train.keys and len(clean.train) == 120
    result = run_experiment(spec)
    assert result["defense"] == "clip-clean" == spec.folder.name
    assert result["pairs_total"] == 120 and result["poison_total"] == {} and result["attacks"].keys() == POISON.keys()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"defense": "nothing"}, "unknown defence 'nothing'"),
        ({"attacks": ("badnet",)}, "unknown attack 'badnet'; did you mean 'badnets'"),
        ({"target": "bananas"}, "target 'bananas' is not among .*did you mean 'banana'"),
        ({"hold_out": "wingdings"}, "unknown style 'wingdings'"),
        ({"model": "otcclip-huge"}, "open_clip knows no such model"),
        ({"options": {"colour": 1}}, "'colour'"),
    ],
)
def test_what_does_not_exist_is_one_line(changed: dict[str, Any], says: str, small_emoji: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run_experiment(spec_of(small_emoji, tmp_path, **changed))
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("result.json"))


def test_evaluated_about_eight_times_and_at_the_end() -> None:
    """The spec of the demo: sixteen epochs, eight evaluations."""
    for total, times in ((1, 1), (3, 3), (8, 8), (16, 8), (17, 9), (100, 9)):
        evaluated = [epoch for epoch in range(total) if experiment._is_evaluated(epoch, total)]
        assert evaluated[-1] == total - 1 and len(evaluated) == times


def test_a_checkpoint_of_another_spec_is_never_taken_up(small_emoji: Path, tmp_path: Path) -> None:
    first = spec_of(small_emoji, tmp_path / "a", epochs=1)
    run_experiment(first)
    (first.folder / "spec.json").unlink()
    (first.folder / "result.json").unlink()
    run_experiment(replace(first, seed=1))
    run_experiment(replace(first, seed=1, out=str(tmp_path / "b")))
    weights = "open_clip_model.safetensors"
    assert (first.folder / weights).read_bytes() == (tmp_path / "b" / "clip" / weights).read_bytes()


@pytest.mark.parametrize("parts", [{"model": {}, "epoch": 1}, {}])
def test_a_checkpoint_that_lacks_parts_is_one_line(parts: dict[str, Any], small_emoji: Path, tmp_path: Path) -> None:
    spec = spec_of(small_emoji, tmp_path)
    identity = spec.identity()
    experiment.write_json(spec.folder / "spec.json", identity)
    lacking = {"spec": json.dumps(identity, sort_keys=True), **parts}
    save_state(spec.folder / "checkpoint" / "last.pt", lacking)
    with pytest.raises(UserError, match=r"last\.pt: checkpoint lacks parts"):
        run_experiment(spec)
