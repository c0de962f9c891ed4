"""`otcclip train` and `otcclip evaluate` on small files: what they write, and that plain open_clip reads it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from otcclip import cli
from otcclip.data import Pair, write_shard
from otcclip.data.pairs import PairStore
from otcclip.data.state import StateTable
from otcclip.defenses.base import ACTIONS, keep_all, training_pairs
from otcclip.errors import UserError
from otcclip.models import create_two_tower, load_two_tower
from otcclip.training import run as run_module
from otcclip.training.checkpoint import load_state
from otcclip.training.evaluate import EvalSpec, evaluate_model
from otcclip.training.judge import png
from otcclip.training.pair_state import contents, put_state, state_table
from otcclip.training.run import train
from otcclip.training.train_spec import TrainSpec


@pytest.fixture(scope="module")
def shards(make_store: Callable[..., PairStore], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 labelled pairs in two shards, one of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    store = make_store(26, 8, own_caption=True)
    pairs = [
        Pair(key, png(image), caption, label)
        for key, image, caption, label in zip(store.keys, store.images, store.captions, store.labels, strict=True)
    ]
    pairs[3] = replace(pairs[3], image=b"\x89PNG\r\n\x1a\n broken")
    write_shard(folder / "0.tar", pairs[:14])
    write_shard(folder / "1.tar", pairs[14:])
    (folder / "names.txt").write_text("\n".join(sorted(set(store.labels))))
    return folder


def spec_of(shards: Path, logs: Path, **more: object) -> TrainSpec:
    settings = {
        "model": "otcclip-tiny",
        "defense": "clip",
        "batch_size": 8,
        "epochs": 2,
        "workers": 0,
        "logs": str(logs),
        "name": "run",
        "report_to": "none",
        "save_seconds": 0.0,
        "device": "cpu",
        "threads": 1,
    }
    return TrainSpec(str(shards / "{0..1}.tar"), **{**settings, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    train(spec_of(shards, logs, val_data=str(shards / "1.tar"), val_classnames=str(shards / "names.txt")))
    return logs / "run"


def test_what_a_run_writes(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["pairs"] == 25 and result["skipped"] == 1 and np.isfinite(result["loss"])
    skipped = pq.read_table(run / "skipped.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in skipped] == [("pair-0003", "broken image")]
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [0, 1] and all(line["visited"] == 24 for line in history)
    assert set(history[1]["eval"]) == {"zeroshot_classification", "zeroshot_retrieval"}
    decisions = pq.read_table(run / "decisions.parquet")
    assert decisions.num_rows == 25 and set(decisions["action"].to_pylist()) == {"keep"}


def test_a_checkpoint_opens_in_plain_open_clip_with_identical_features(run: Path) -> None:
    mine = load_two_tower(run, "otcclip-tiny").eval()
    plain = open_clip.create_model("otcclip-tiny", pretrained=str(run / "open_clip_model.safetensors")).eval()
    by_folder = open_clip.create_model(f"local-dir:{run}").eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    normalised = ((images - mine.mean) / mine.std).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = mine.image(images).pooled
        for model in (plain, by_folder):
            same_layout = model.to(memory_format=torch.channels_last)  # another layout rounds otherwise
            assert torch.equal(same_layout.encode_image(normalised, normalize=True), expected)
    trained = load_state(run / "checkpoint" / "last.pt")["model"]
    assert all(torch.equal(value, trained[f"clip.{name}"]) for name, value in plain.state_dict().items())


def test_evaluate_in_clip_benchmarks_shape(run: Path, shards: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(shards / "1.tar"), "--classnames", str(shards / "names.txt"), "--workers", "0"]
    cache = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.json")]
    assert cli.main(["evaluate", str(run), *arguments, *cache]) == 0
    classification, retrieval = json.loads((tmp_path / "out.json").read_text())
    assert classification["task"] == "zeroshot_classification" and retrieval["task"] == "zeroshot_retrieval"
    assert classification["model"] == "otcclip-tiny" and classification["n"] == retrieval["n"] == 12
    for row in (classification, retrieval):
        assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= set(row)
        for name, (low, high) in row["intervals"].items():
            assert 0 <= low <= row["metrics"][name] <= high <= 1
    last = json.loads((run / "history.jsonl").read_text().splitlines()[-1])["eval"]
    assert last == {row["task"]: row["metrics"] for row in (classification, retrieval)}


def test_evaluate_of_what_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk of a file")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "result.json").write_text('{"model": "otcclip-tiny"}')
    for name, more in (("junk.pt", ["--model", "otcclip-tiny"]), ("empty.pt", ["--model", "RN50"]), ("folder", [])):
        assert cli.main(["evaluate", str(tmp_path / name), "--data", "x.csv", *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"otcclip: {tmp_path / name}") and said.count("\n") == 1


def test_a_run_is_neither_overwritten_nor_taken_up_by_another(run: Path, shards: Path) -> None:
    spec = spec_of(shards, run.parent)
    with pytest.raises(UserError, match=r"run holds a run: --resume latest goes on with it"):
        train(spec)
    with pytest.raises(UserError, match=r"made with lr 0\.0005, now it is 0\.1; use another --name"):
        train(replace(spec, lr=0.1, resume="latest"))
    with pytest.raises(UserError, match="no such checkpoint"):
        train(replace(spec, name="other", resume="nowhere.pt"))


def test_another_runs_checkpoint_does_not_replace_a_finished_run(run: Path, shards: Path, tmp_path: Path) -> None:
    """`--resume PATH` under the name of a run that is there: refused, and not a byte of it changes."""
    shutil.copytree(run, tmp_path / "kept")
    before = (tmp_path / "kept" / "open_clip_model.safetensors").read_bytes()
    spec = spec_of(shards, tmp_path, val_data=str(shards / "1.tar"), val_classnames=str(shards / "names.txt"))
    with pytest.raises(UserError, match=r"kept holds a run: --resume latest goes on with it"):
        train(replace(spec, name="kept", resume=str(run / "checkpoint" / "last.pt")))
    assert (tmp_path / "kept" / "open_clip_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_gradient_is_not_clipped_to_nothing(clip: float, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--grad-clip-norm .*: above 0; inf for no clipping"):
        train(spec_of(shards, tmp_path, grad_clip_norm=clip))


def test_a_model_that_diverged_is_one_line_and_no_finished_run(shards: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        train(spec_of(shards, tmp_path, lr=1e30, epochs=1, val_data=str(shards / "1.tar")))
    assert not (tmp_path / "run" / "result.json").exists()
    broken = load_two_tower(run, "otcclip-tiny")
    with torch.no_grad():
        next(broken.clip.visual.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"there: features of images are not finite"):
        evaluate_model(broken, EvalSpec(str(shards / "1.tar"), workers=0), tmp_path / "cache", "there")


def test_what_is_bad_in_validation_counts_against_the_same_share(shards: Path, tmp_path: Path) -> None:
    """One of 14 is broken there, which is more than 5 %."""
    spec = spec_of(shards, tmp_path, epochs=1, val_data=str(shards / "0.tar"))
    with pytest.raises(UserError, match=r"1 of 14 pairs are bad"):
        train(spec)
    assert np.isfinite(train(replace(spec, name="more", max_bad=0.1))["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs 0: at least 1"),
        ({"lr": -1.0}, "--lr must be positive"),
        ({"precision": "fp8"}, "--precision 'fp8'"),
        ({"defense": "otclip"}, "did you mean 'otcclip'"),
        ({"defense": "cleanclip"}, "it takes --pretrained and --trusted"),
        ({"report_to": "paper"}, "--report-to 'paper'"),
        ({"grad_checkpointing": True}, "has a ResNet tower"),
        ({"max_bad": 0.01}, "1 of 26 pairs are bad"),
        ({"model": "RN51"}, "open_clip knows no such model"),
        ({"pretrained": "nosuch"}, "nosuch: neither a file nor a tag that open_clip has for otcclip-tiny"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"threads": 0}, "--threads 0: at least 1"),
        ({"seed": 99999999999999999999}, "--seed 99999999999999999999: seeds are whole numbers from 0"),
        ({"seed": -1}, "--seed -1: seeds are"),
        ({"val_classnames": "names.txt"}, r"--val-classnames names\.txt: says nothing without --val-data"),
    ],
)
def test_bad_settings_are_one_line(change: dict[str, object], message: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(spec_of(shards, tmp_path, **change))
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_validation_that_cannot_be_read_is_told_before_any_training(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(run_module.Trainer, "epochs", never)
    validation = str(shards / "1.tar")
    (tmp_path / "few.txt").write_text("polar bear\nbanana")
    for change, message in (
        ({"val_data": "nosuch.csv"}, "nosuch.csv"),
        ({"val_data": validation, "val_classnames": "nosuch.txt"}, "nosuch.txt: cannot read"),
        ({"val_data": validation, "val_classnames": str(tmp_path / "few.txt")}, "not among the class names"),
    ):
        with pytest.raises(UserError, match=message):
            train(spec_of(shards, tmp_path / "logs", **change))


def _train_quietly(spec: TrainSpec) -> None:
    train(spec)


def test_killed_anywhere_it_ends_with_the_same_weights(run: Path, shards: Path, tmp_path: Path) -> None:
    """kill -9 after the checkpoint of a step in the first epoch, and in the second; decoding on demand besides."""
    spec = spec_of(shards, tmp_path, resume="latest", decoded_gib=0.0)
    context = multiprocessing.get_context("fork")
    last = tmp_path / "run" / "checkpoint" / "last.pt"
    kills = 0
    for _ in range(3):
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = context.Process(target=_train_quietly, args=(spec,))
        child.start()
        while child.is_alive() and not (last.exists() and last.stat().st_mtime_ns != before):
            time.sleep(0.005)
        if child.is_alive() and child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
    assert kills == 3 and load_state(last)["epoch"] < 2
    train(spec)
    expected, got = load_state(run / "checkpoint" / "last.pt"), load_state(last)
    assert all(torch.equal(value, got["model"][name]) for name, value in expected["model"].items())
    one, other = expected["optimizer"]["state"], got["optimizer"]["state"]
    assert all(torch.equal(one[i][k], other[i][k]) for i in one for k in one[i])


def _pairs_of(store: PairStore) -> list[Pair]:
    rows = zip(store.keys, store.images, store.captions, strict=True)
    return [Pair(key, png(image), caption) for key, image, caption in rows]


def test_trust_survives_another_sharding_and_order(
    make_store: Callable[..., PairStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off inside an epoch in force of decisions; the same pairs lie shuffled in other shards when it goes on."""
    pairs = _pairs_of(make_store(32, 4, own_caption=True))
    write_shard(tmp_path / "a.tar", pairs)
    spec = spec_of(tmp_path, tmp_path, defense="otcclip:alpha=0.3,first_refresh=1,refresh=1", name="whole")
    spec = replace(spec, train_data=str(tmp_path / "a.tar"))
    train(spec)
    saves: list[int] = []
    real = run_module._Run._save

    def cut_off(self: run_module._Run) -> None:
        real(self)
        if len(saves) == 5:
            raise KeyboardInterrupt
        saves.append(1)

    monkeypatch.setattr(run_module._Run, "_save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(replace(spec, name="cut"))
    monkeypatch.undo()
    assert load_state(tmp_path / "cut" / "checkpoint" / "last.pt")["epoch"] == 1
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    write_shard(tmp_path / "b.tar", shuffled[:5])
    write_shard(tmp_path / "c.tar", shuffled[5:])
    (tmp_path / "a.tar").unlink()
    elsewhere = replace(spec, train_data=str(tmp_path / "{b..c}.tar"), name="cut", resume="latest")
    with pytest.raises(UserError, match=r"made with other pairs \(then 32, now 5, or with other captions\)"):
        train(replace(elsewhere, train_data=str(tmp_path / "b.tar")))
    train(elsewhere)
    one, other = (load_state(tmp_path / name / "checkpoint" / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert torch.equal(one["defense"]["action"], other["defense"]["action"])


def test_the_state_of_pairs_can_be_looked_up_by_key(run: Path) -> None:
    decided = pq.read_table(run / "decisions.parquet")
    keys = decided["key"].to_pylist()[::-1]
    found = StateTable.open(run / "pairs.state").get(keys)
    assert [ACTIONS[a] for a in found["action"]] == decided["action"].to_pylist()[::-1]
    said = sorted(set(decided["caption"].to_pylist()))
    assert [said[c] for c in found["caption"]] == decided["caption"].to_pylist()[::-1]


def test_pairs_are_known_by_their_keys_their_captions_and_which_has_which(make_store: Callable[..., PairStore]) -> None:
    model = create_two_tower("otcclip-tiny", seed=0)
    pairs = training_pairs(make_store(8, 4).without_labels(), model)
    others = (
        replace(pairs, keys=("another", *pairs.keys[1:])),
        replace(pairs, captions=("another", *pairs.captions[1:])),
        replace(pairs, caption_of=pairs.caption_of.flip(0)),
    )
    assert len({contents(one) for one in (pairs, replace(pairs, keys=tuple(pairs.keys)), *others)}) == 4


def test_a_table_of_other_pairs_or_a_damaged_one_is_written_anew(
    make_store: Callable[..., PairStore], tmp_path: Path
) -> None:
    model = create_two_tower("otcclip-tiny", seed=0)
    few, more = (training_pairs(make_store(n, 4).without_labels(), model) for n in (8, 12))
    path = tmp_path / "pairs.state"
    for pairs in (few, more, more):
        put_state(state_table(path, pairs), keep_all(pairs))
        assert len(StateTable.open(path)) == len(pairs)
    path.write_bytes(path.read_bytes()[:-3])
    put_state(state_table(path, more), keep_all(more))
    assert len(StateTable.open(path)) == 12


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    shards: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    real = torch.save

    def full(state: object, handle: object) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device", None)
        real(state, handle)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(spec_of(shards, tmp_path))
    monkeypatch.undo()
    train(spec_of(shards, tmp_path, resume="latest"))
    expected = load_state(run / "checkpoint" / "last.pt")["model"]
    got = load_state(tmp_path / "run" / "checkpoint" / "last.pt")["model"]
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_shard_that_vanishes_is_one_line_and_the_run_goes_on_later(shards: Path, tmp_path: Path, run: Path) -> None:
    copies = tmp_path / "shards"
    shutil.copytree(shards, copies, copy_function=shutil.copy2)
    spec = spec_of(copies, tmp_path, decoded_gib=0.0)

    def vanish(self: object) -> None:
        (copies / "1.tar").rename(tmp_path / "1.tar")
        real(self)

    real = run_module._Run._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module._Run, "_save", vanish)
        with pytest.raises(UserError, match=r"1\.tar: .*put it back, then the same command with --resume latest"):
            train(spec)
    (tmp_path / "1.tar").rename(copies / "1.tar")
    train(replace(spec, resume="latest"))
    expected = load_state(run / "checkpoint" / "last.pt")["model"]
    got = load_state(tmp_path / "run" / "checkpoint" / "last.pt")["model"]
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
