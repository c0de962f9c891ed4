"""`otcclip bench` as a user types it: refusals in one line before anything is written, and a kill in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from otcclip import bench
from otcclip.bench.plan import slug
from otcclip.cli import main

GROUP = "badnets:count=20"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--attacks", "badnet"], "unknown attack 'badnet'; did you mean 'badnets'"),
        (["--defenses", "otclip"], "unknown defence 'otclip'; did you mean 'otcclip'"),
        (["--attacks", "badnets:target=bananna"], "target 'bananna' is not among the 24 class names"),
        (["--attacks", "badnets:count=5000"], "count 5000 is more than the"),
        (["--attacks", "badnets:count=9", "--target", "bananna"], "target 'bananna' is not among"),
        (["--attacks", "badnets", "--poison-rate", "2"], "--poison-rate 2: a share of the training pairs"),
        (["--hold-out", "wingdings"], "unknown style 'wingdings'"),
        (["--attacks", GROUP, "--processes", "0"], "--processes 0: at least 1"),
        (["--attacks", GROUP, "--utility", "prob"], "unknown utility 'prob'; did you mean 'probe'"),
        (["--attacks", GROUP, "--utility", "openclipart"], "build one with `otcclip corpus openclipart --out"),
        (["--attacks", GROUP, "--utility", "fashion-mnist"], "get it with `otcclip corpus fashion-mnist --out"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything(
    arguments: list[str], says: str, small_emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "matrix"
    assert main(["bench", "--out", str(out), "--corpus", str(small_emoji), *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("otcclip: ") and said.count("\n") == 1
    assert not out.exists()


def test_a_misspelt_name_builds_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "emoji"
    assert main(["bench", "--attacks", "badnet", "--corpus", str(corpus), "--out", str(tmp_path / "out")]) == 2
    assert "unknown attack" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_flags_reach_the_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(bench, "run_bench", lambda spec, processes: seen.update(spec=spec, processes=processes))
    flags = ["--attacks", "plain", "badnets:target=guitar,count=9+sig", "--defenses", "otcclip:alpha=0.01"]
    flags += ["--seeds", "3", "4", "--poison-rate", ".001", ".01", "--utility", "probe", "--epochs", "2"]
    flags += ["--hold-out", "noto", "--target", "rocket", "--processes", "3", "--no-clean-reference"]
    assert main(["bench", *flags, "--out", str(tmp_path / "o"), "--corpus", str(tmp_path / "c")]) == 0
    assert seen["processes"] == 3
    assert seen["spec"] == bench.BenchSpec(
        corpus=str(tmp_path / "c"),
        out=str(tmp_path / "o"),
        attacks=("plain", "badnets:target=guitar,count=9+sig"),
        defenses=("otcclip:alpha=0.01",),
        seeds=(3, 4),
        hold_out="noto",
        target="rocket",
        epochs=2,
        poison_rates=(0.001, 0.01),
        reference=False,
        utility=("probe",),
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], log: Path, seconds: float = 1200) -> None:
    for _ in range(int(seconds / 0.05)):
        if path.exists():
            return
        assert process.poll() is None, f"it ended before it was to be killed: {log.read_text()}"
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_a_matrix_that_was_killed_goes_on(
    one_process: None, small_emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL after the first cell, with the second under way: the first stays, the second is finished."""
    out = tmp_path / "matrix"
    arguments = ["bench", "--corpus", str(small_emoji), "--out", str(out)]
    arguments += ["--attacks", GROUP, "--defenses", "clip", "roclip", "--seeds", "0", "--epochs", "2"]
    arguments += ["--target", "rocket", "--processes", "1", "--no-clean-reference"]
    command = [sys.executable, "-m", "otcclip.cli", *arguments]
    folder = out / slug(GROUP) / "seed-0"
    log = tmp_path / "log"
    with log.open("w") as written, subprocess.Popen(command, stderr=written) as process:
        wait_for(folder / "clip" / "cell.json", process, log)
        wait_for(folder / "roclip" / "spec.json", process, log)
        process.send_signal(signal.SIGKILL)
    first = (folder / "clip" / "cell.json").stat().st_mtime_ns
    assert not (folder / "roclip" / "cell.json").exists()
    capsys.readouterr()
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "2 cells, 1 of them finished" in said and "wall time" in said
    assert (folder / "clip" / "cell.json").stat().st_mtime_ns == first, "what was finished is not touched"
    assert json.loads((folder / "roclip" / "cell.json").read_text())["defense"] == "roclip"
    calls = json.loads((out / "bench.json").read_text())["calls"]
    assert [call["trained"] for call in calls] == [1, 1], "the killed call's time and cells count too"
    assert all(call["seconds"] > 0 for call in calls)
