"""Many jobs: the order they may run in, what becomes of those that fail, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip.errors import UserError
from otcclip.registry import find
from otcclip.training.fleet import Job, Schedule, run_fleet


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, tuple[str, ...]]:
    """Jobs in any order, each after some that stand before it in another order: no circles."""
    names = [f"job {i}" for i in range(draw(st.integers(1, 8)))]
    needs = {name: tuple(draw(st.sets(st.sampled_from(names[:i])))) if i else () for i, name in enumerate(names)}
    return {name: needs[name] for name in draw(st.permutations(names))}


@given(graphs(), st.data())
def test_a_job_starts_after_those_it_needs_and_every_job_ends(graph: dict[str, tuple[str, ...]], data: Any) -> None:
    schedule, running, done, lost = Schedule(graph), [], set(), set()
    while True:
        while (name := schedule.next()) is not None:
            assert done >= set(graph[name]) and name not in done | lost
            running.append(name)
        if not running:
            break
        name = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if data.draw(st.booleans()):
            schedule.succeed(name)
            done.add(name)
        else:
            gone = schedule.fail(name)
            assert not lost & {name, *gone}
            lost |= {name, *gone}
    assert done | lost == set(graph), "nothing waits for ever"
    for name in done:
        assert not lost & set(graph[name])


@given(graphs())
def test_the_first_that_can_start_starts(graph: dict[str, tuple[str, ...]]) -> None:
    schedule, order, done = Schedule(graph), list(graph), set[str]()
    while (name := schedule.next()) is not None:
        assert name == next(other for other in order if done.issuperset(graph[other]))
        order.remove(name)
        schedule.succeed(name)
        done.add(name)


def test_jobs_that_wait_in_a_circle_or_for_nobody() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        Schedule({"a": ("b",), "b": ("c",), "c": ("a",)})
    with pytest.raises(ValueError, match=r"no job: \['z'\]"):
        Schedule({"a": ("z",)})


def fleet_of(work: dict[str, Callable[[], Any]], folder: Path, after: dict[str, tuple[str, ...]]) -> list[Job]:
    return [Job(name, what, folder, None, after.get(name, ())) for name, what in work.items()]


def refuse() -> partial[Any]:
    """Work that ends with a UserError; a function that a new process can import."""
    return partial(find, "attack", {}, "nothing")


def test_results_failures_and_what_needs_them(tmp_path: Path) -> None:
    work = {
        "good": partial(dict, value=1),
        "refused": refuse(),
        "needs refused": partial(dict, value=2),
        "needs that": partial(dict, value=3),
        "gone": partial(os._exit, 3),
        "killed": os.abort,
        "needs good": partial(dict, value=4),
    }
    after = {"needs refused": ("refused",), "needs that": ("needs refused", "good"), "needs good": ("good",)}
    told: dict[str, Any] = {}
    jobs = fleet_of(work, tmp_path, after)
    done = run_fleet(jobs, 3, on_done=lambda job, result: told.update({job.name: result}), keep_going=True)
    assert done == {"good": {"value": 1}, "needs good": {"value": 4}}
    assert set(told) == set(work)
    assert "unknown attack 'nothing'" in str(told["refused"])
    assert str(told["needs refused"]).startswith("needs refused, which failed: unknown attack")
    assert str(told["needs that"]).startswith("needs ")
    assert "process of gone ended with exit code 3" in str(told["gone"])
    assert f"process of killed ended by signal {signal.SIGABRT.value}" in str(told["killed"])


def test_the_first_failure_ends_all_unless_told_to_go_on(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="unknown attack 'nothing'"):
        run_fleet(fleet_of({"long": partial(time.sleep, 60), "refused": refuse()}, tmp_path, {}), 2)
    assert time.monotonic() - start < 30, "the long job was waited for"


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)broken failed:.*Traceback.*ZeroDivisionError"):
        run_fleet(fleet_of({"broken": partial(divmod, 1, 0)}, tmp_path, {}), 1, keep_going=True)


def test_lines_of_a_history_are_told_once(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    seen: list[int] = []
    job = Job("one", partial(dict, value=1), tmp_path, 2)
    run_fleet([job], 1, on_epoch=lambda _, line: seen.append(line["epoch"]))
    assert seen == [], "a history that cannot be read yet tells nothing"
    (tmp_path / "history.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    run_fleet([job], 1, on_epoch=lambda _, line: seen.append(line["epoch"]))
    assert seen == [0, 1]


PARENT = """
import sys, time
from functools import partial
from pathlib import Path
from otcclip.training.fleet import Job, run_fleet
if __name__ == "__main__":
    run_fleet([Job("writer", partial(exec, sys.argv[2]), Path(sys.argv[1]))], 1)
"""
WRITER = "import os, time, pathlib\npathlib.Path({!r}).write_text(str(os.getpid()))\ntime.sleep(60)"


def _ends(pid: int, seconds: float) -> bool:
    for _ in range(int(seconds / 0.1)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_job_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """Else it would go on writing where the resumed job writes."""
    script, pid_file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    command: Sequence[str] = [sys.executable, str(script), str(tmp_path), WRITER.format(str(pid_file))]
    with subprocess.Popen(command) as parent:
        for _ in range(300):
            if pid_file.exists() and pid_file.read_text():
                break
            time.sleep(0.1)
        parent.kill()
    assert _ends(int(pid_file.read_text()), 20)
