"""Two calls in one folder: the second is told so, whatever became of the first one's process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from otcclip.bench.lock import sole_bench
from otcclip.cli import main
from otcclip.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from otcclip.bench.lock import sole_bench
with sole_bench(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_bench_is_one_line_and_changes_nothing(
    small_emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "matrix"
    command = ["bench", "--corpus", str(small_emoji), "--out", str(out), "--attacks", "badnets:count=9"]
    with sole_bench(out):
        assert main([*command, "--epochs", "1", "--target", "rocket"]) == 2
    said = capsys.readouterr().err
    assert f"another otcclip bench is at work in {out}" in said and said.count("\n") == 1
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_killed_process_frees_the_folder_and_until_then_holds_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            with pytest.raises(UserError, match="at work in"), sole_bench(tmp_path):
                pass
        finally:
            process.send_signal(signal.SIGKILL)
    with sole_bench(tmp_path):
        pass
    with sole_bench(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), sole_bench(tmp_path / "file"):
        pass
