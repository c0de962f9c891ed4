"""Runs of the baselines on the small corpus; those that mend a finished model start from it and from trusted pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from otcclip.errors import UserError
from otcclip.training.experiment import RunSpec, make_setting, run_experiment, start_of
from otcclip.training.run import make_defense
from otcclip.training.setting import trusted_keys
from otcclip.training.train_spec import TrainSpec

pytestmark = pytest.mark.usefixtures("quiet")

TRAIN, POISON = 360, {"badnets": 90, "targeted": 240}
TRUSTED = 18  # 5 % of 360
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def clip(small_emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A finished undefended run."""
    out = tmp_path_factory.mktemp("runs")
    spec = RunSpec(str(small_emoji), str(out), "clip", hold_out="twemoji", epochs=2, batch_size=120)
    run_experiment(spec)
    return spec


def history_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("defense", "options", "terms"),
    [
        ("roclip", {}, [{"clip"}, {"match"}]),
        ("roclip", {"every": 1, "variant": "live"}, [{"match"}, {"match"}]),
        (
            "safeclip",
            {"unimodal_epochs": 1, "slow_epochs": 1},
            [{"images", "captions"}, {"clip"}, {"clip", "images", "captions"}],
        ),
    ],
)
def test_a_run_from_scratch(
    defense: str, options: dict[str, Any], terms: list[set[str]], clip: RunSpec, tmp_path: Path
) -> None:
    spec = replace(clip, out=str(tmp_path), defense=defense, options=options, epochs=len(terms))
    result = run_experiment(spec)
    history = history_of(spec.folder)
    assert [set(line["terms"]) for line in history] == terms
    assert all(np.isfinite(line["loss"]) for line in history) and "start" not in result
    for line in history:
        assert line["kept"] + line["repaired"] + line["held_back"] == TRAIN
    if defense == "roclip":
        assert history[-1]["repaired"] > TRAIN / 2, "few own captions are in a pool of 2 %"
    else:
        assert history[0]["held_back"] == TRAIN == history[1]["kept"] and history[2]["held_back"] > 0
        assert history[2]["trust_auroc"].keys() == POISON.keys() and "trust_auroc" not in history[0]


@pytest.mark.parametrize(("defense", "terms"), [("cleanclip", {"clip", "views"}), ("par", {"clip", "image shift"})])
def test_a_finished_run_is_mended(defense: str, terms: set[str], clip: RunSpec) -> None:
    spec = replace(clip, defense=defense, options={"epoch_share": 0.5, "lr": 2e-4})
    result = run_experiment(spec)
    (line,) = history_of(spec.folder)
    assert line["terms"].keys() >= terms and np.isfinite(line["loss"])
    assert (line["kept"], line["held_back"]) == (TRUSTED, TRAIN - TRUSTED)
    assert result["poison_kept"] == dict.fromkeys(POISON, 0) and result["epochs"] == 2
    before = json.loads((clip.folder / "result.json").read_text())
    assert result["start"] == {"defense": "clip", "seconds": before["seconds"]}
    mended, first = (load_file(spec_.folder / WEIGHTS) for spec_ in (spec, clip))
    moved = {name: (mended[name] - first[name]).abs().max().item() for name in first if first[name].is_floating_point()}
    # Three steps of Adam at a rate of 2e-4 at most: near the model that it started from, and not at it.
    weights = {name: by for name, by in moved.items() if "running" not in name}
    assert 0 < max(weights.values()) < 3 * 2e-4 * 1.5


def test_par_cut_off_ends_as_one_never_cut(clip: RunSpec, cut_off: Callable[[RunSpec], None]) -> None:
    """The poisoned model is in the checkpoint: what it resumes from is already another."""
    whole = replace(clip, defense="par", name="whole", options={"epoch_share": 1.0})
    run_experiment(whole)
    cut = replace(whole, name="cut")
    cut_off(cut)
    run_experiment(cut)
    assert (cut.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


def test_without_a_finished_run_there_is_nothing_to_mend(clip: RunSpec, tmp_path: Path) -> None:
    for spec in (replace(clip, defense="par", out=str(tmp_path)), replace(clip, defense="par", seed=1)):
        with pytest.raises(UserError, match="par: starts from a finished run of clip with the same settings, and"):
            run_experiment(spec)
    assert not list(tmp_path.iterdir())


def test_a_run_is_what_it_started_from(clip: RunSpec) -> None:
    """Another start is another run; runs that start from nothing are what they were before there were any others."""
    par = replace(clip, defense="par")
    assert start_of(clip) is None and start_of(par) == clip
    other = replace(clip, name="clip-long", epochs=3)
    assert start_of(replace(par, start=other)) == other
    assert replace(par, start=other).identity() != par.identity() == replace(par, start=clip).identity()
    assert replace(par, trusted_share=0.1).identity() != par.identity()
    assert replace(clip, trusted_share=0.1, start=other).identity() == clip.identity()
    assert not {"start", "trusted_share"} & clip.identity().keys()


def test_trusted_pairs_are_honest_and_follow_the_seed(clip: RunSpec) -> None:
    setting = make_setting(clip, 64)
    keys = trusted_keys(clip, setting)
    poison = {record.key for record in setting.records}
    assert len(set(keys)) == TRUSTED and not poison & set(keys) and set(keys) <= set(setting.train.keys)
    assert keys == trusted_keys(clip, setting) != trusted_keys(replace(clip, seed=1), setting)
    honest = TRAIN - len(poison)
    assert len(trusted_keys(replace(clip, trusted_share=honest / TRAIN), setting)) == honest
    for share in (0.0, 1e-6, 0.9, 1.5):
        with pytest.raises(UserError, match=rf"trusted share {share}: of 360 pairs 30 are honest"):
            trusted_keys(replace(clip, trusted_share=share), setting)


def test_a_run_is_what_its_files_hold(clip: RunSpec, tmp_path: Path) -> None:
    """Another patch at the same path, or another corpus, is another run; where they lie is not."""
    patch = tmp_path / "patch.npy"
    np.save(patch, np.zeros((3, 8, 8), np.float32))
    spec = replace(clip, attacks=(f"badclip:patch={patch}",))
    before = spec.identity()
    assert before == spec.identity() and before["files"]["badclip patch"] != "missing"
    np.save(patch, np.ones((3, 8, 8), np.float32))
    assert spec.identity() != before
    moved = tmp_path / "moved"
    shutil.copytree(clip.corpus, moved)
    assert replace(clip, corpus=str(moved)).identity() == clip.identity()
    index = pq.read_table(moved / "index.parquet")
    captions = pa.array(["other", *index["caption"].to_pylist()[1:]])
    pq.write_table(index.set_column(index.column_names.index("caption"), "caption", captions), moved / "index.parquet")
    assert replace(clip, corpus=str(moved)).identity() != clip.identity()


def test_under_train_the_budget_is_the_runs() -> None:
    spec = TrainSpec("x.tar", defense="cleanclip:lr=1e-9", pretrained="w", trusted="t")
    with pytest.raises(UserError, match="its budget is --lr and --epochs"):
        make_defense(spec)
    assert make_defense(replace(spec, defense="cleanclip:lambda_view=2")).name == "cleanclip"
