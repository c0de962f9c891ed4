"""The command line: what cannot be done is one line on stderr and exit code 2, with nothing written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from otcclip import demo
from otcclip.cli import main
from otcclip.errors import UserError
from otcclip.training.experiment import RunSpec, run_experiment

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def built(small_emoji: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small corpus stands where the real one would be built, and runs go one by one in this process."""
    real = demo.build_emoji

    def reuse(folder: Path, **how: Any) -> None:
        if folder != small_emoji:
            real(folder, **how)

    def in_turn(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
        return [run_experiment(spec) for spec in specs]

    monkeypatch.setattr(demo, "build_emoji", reuse)
    monkeypatch.setattr(demo, "_run_all", in_turn)
    return small_emoji


def test_the_version_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"otcclip {version('otcclip')}\n"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `arguments` end with."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("otcclip: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--defenses", "otclip"], "unknown defence 'otclip'; did you mean 'otcclip'"),
        (["--defenses", "clip", "nothing"], "unknown defence 'nothing'; there are: clip, otcclip-paper, otcclip"),
        (["--target", "bananna"], "target 'bananna' is not among"),
        (["--hold-out", "wingdings"], "unknown style 'wingdings'"),
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--seed", "-1"], "--seed -1: seeds are whole numbers from 0 to 4294967295"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: seeds are whole numbers"),
        (["--defenses"], "demo: name at least one defence"),
    ],
)
def test_demo_refuses_what_does_not_exist(
    arguments: list[str], says: str, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert says in refused(["demo", "--out", str(out), "--corpus", str(built), *arguments], capsys)
    assert not out.exists()


def test_demo_with_an_unknown_style_builds_no_corpus(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "emoji"
    said = refused(["demo", "--out", str(tmp_path / "runs"), "--corpus", str(corpus), "--hold-out", "segoe"], capsys)
    assert "unknown style 'segoe': choose one of" in said and "twemoji" in said
    assert not list(tmp_path.iterdir())


def test_poison_refuses_a_seed_out_of_range(
    small_emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "poisoned"
    assert "--seed -1: seeds are" in refused(["poison", str(small_emoji), "--out", str(out), "--seed", "-1"], capsys)
    assert not list(tmp_path.iterdir())


def test_a_defence_named_twice_is_one_run(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
        ran.extend(spec.folder.name for spec in specs)
        raise UserError("enough")

    monkeypatch.setattr(demo, "_run_all", note)
    arguments = ["--defenses", "clip", "otcclip", "clip", "--out", str(tmp_path), "--corpus", str(built)]
    assert main(["demo", *arguments]) == 2
    assert ran == ["clip", "otcclip", "clip-clean"]


def test_corpus_with_an_unknown_style(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["corpus", "emoji", "--out", str(tmp_path / "emoji"), "--hold-out", "segoe"], capsys)
    assert "unknown style 'segoe'" in said
    assert not list(tmp_path.iterdir())


def test_corpus_into_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "exists and is no emoji corpus" in refused(["corpus", "emoji", "--out", str(tmp_path)], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "nowhere") in refused(["report", str(tmp_path / "nowhere")], capsys)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("arguments", [["demo", "--epochs", "many"], ["demo", "--colour", "red"], ["dance"]])
def test_what_cannot_be_parsed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_stopping_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    assert main(["demo"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "secret\x1b[2J")

    monkeypatch.setattr(demo, "run_demo", forbidden)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "otcclip: 'secret\\x1b[2J': Permission denied\n"
    assert main(["report", "x" * 300]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the user can mend is one line; a bug keeps its traceback."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "run_demo", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["demo"])


def test_flags_reach_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def take(out: Path, corpus: Path, **options: Any) -> None:
        seen.update(options, out=out, corpus=corpus)

    monkeypatch.setattr(demo, "run_demo", take)
    flags = ["--hold-out", "noto", "--target", "rocket", "--seed", "7", "--epochs", "3", "--defenses", "otcclip"]
    flags += ["--no-clean-reference", "--out", str(tmp_path / "o"), "--corpus", str(tmp_path / "c")]
    assert main(["demo", *flags]) == 0
    assert seen == {
        "hold_out": "noto",
        "target": "rocket",
        "seed": 7,
        "epochs": 3,
        "chosen": ("otcclip",),
        "reference": False,
        "out": tmp_path / "o",
        "corpus": tmp_path / "c",
    }


def test_demo_and_report(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job on the small corpus: every file of docs/formats.md, a table, a page; the page can be made again."""
    out = tmp_path / "demo"
    flags = ["--out", str(out), "--corpus", str(built), "--target", "rocket", "--epochs", "1", "--defenses", "clip"]
    assert main(["demo", *flags]) == 0
    assert "report.html" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert [result["defense"] for result in results] == ["clip", "clip-clean"]
    clean = {name: rate["asr"] for name, rate in results[1]["attacks"].items()}
    assert results[0]["clean_asr"] == results[1]["clean_asr"] == clean
    settings = json.loads((out / "run.json").read_text())
    assert settings["target"] == "rocket" and settings["hold_out"] == "twemoji" and settings["test_images"] == 24
    assert settings.keys() >= {"corpus", "seed", "epochs", "defenses", "attacks", "image_size", "versions"}
    assert {p.name for p in out.iterdir()} == {
        "results.json",
        "run.json",
        "poison.parquet",
        "report.html",
        "clip",
        "clip-clean",
    }
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page


def test_a_demo_over_a_finished_one_of_another_seed_is_refused_and_nothing_changes(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["demo", "--out", str(tmp_path), "--corpus", str(built), "--target", "rocket", "--epochs", "1"]
    flags += ["--defenses", "clip", "--no-clean-reference"]
    assert main(flags) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    said = refused([*flags, "--seed", "1"], capsys)
    assert f"{tmp_path / 'clip'} holds a finished run of another spec (seed 0, not 1): name another --out" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_error_in_a_run_is_one_line(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """24 captions are too few for the default level of the evidence."""
    flags = ["--out", str(tmp_path), "--corpus", str(built), "--epochs", "1", "--defenses", "otcclip"]
    assert "there is nothing to train on" in refused(["demo", *flags], capsys)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "report.html").exists()


def test_user_errors_are_ordinary_exceptions_in_python(built: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown defence"):
        demo.run_demo(tmp_path / "out", built, chosen=("nothing",))
