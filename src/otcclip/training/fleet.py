"""Many runs on one machine: a process each, as many at a time as asked for, each after those it needs.

    results = run_fleet([Job("clip", partial(run_experiment, spec), spec.folder, epochs=16)], workers=2)

A job has a process of its own, so that its peak memory is its own and a job that is killed takes no other with it.
Processes end with the one that started them, however that ended: a job left over would write where a resumed one does.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.progress import Progress, TaskID

from otcclip.errors import UserError
from otcclip.progress import bar

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A piece of work for one process.

    Attributes:
        name: unique in its fleet; what its bar is called.
        work: what to do; picklable, so a `partial` of a function at module level. Raises UserError for what a user can
            mend.
        folder: where `history.jsonl` grows while it trains. epochs: lines there when it is done.
        after: names of the jobs whose results it needs.
    """

    name: str
    work: Callable[[], dict[str, Any]]
    folder: Path
    epochs: int | None = None
    after: tuple[str, ...] = ()


class Schedule:
    """Which job may start next: the first in order whose `after` are all done; knows nothing of processes."""

    def __init__(self, after: Mapping[str, Sequence[str]]) -> None:
        """Raises ValueError for a name in `after` that is no job, or a circle."""
        self._after = {name: tuple(needs) for name, needs in after.items()}
        if stray := {need for needs in self._after.values() for need in needs} - set(self._after):
            raise ValueError(f"jobs wait for what is no job: {sorted(stray)}")
        self._waiting = list(self._after)
        self._done: set[str] = set()
        order = set[str]()
        while left := [name for name in self._after if name not in order]:
            free = [name for name in left if order.issuperset(self._after[name])]
            if not free:
                raise ValueError(f"jobs wait for each other: {left}")
            order.update(free)

    def next(self) -> str | None:
        """Take the next job that can start; None when all that wait need one that runs."""
        for name in self._waiting:
            if self._done.issuperset(self._after[name]):
                self._waiting.remove(name)
                return name
        return None

    def succeed(self, name: str) -> None:
        self._done.add(name)

    def fail(self, name: str) -> list[str]:
        """Take out every job that needs `name`, directly or through others; their names."""
        lost = {name}
        while more := [o for o in self._waiting if o not in lost and lost.intersection(self._after[o])]:
            lost.update(more)
        gone = [other for other in self._waiting if other in lost]
        self._waiting = [other for other in self._waiting if other not in lost]
        return gone


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    connection: Connection
    task: TaskID
    lines: int = field(default=0)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_fleet(
    jobs: Sequence[Job],
    workers: int,
    *,
    on_epoch: Callable[[Job, dict[str, Any]], None] = lambda job, line: None,
    on_done: Callable[[Job, dict[str, Any] | UserError], None] = lambda job, result: None,
    keep_going: bool = False,
) -> dict[str, dict[str, Any]]:
    """What each job that succeeded returned, by name, in the order given.

    Args:
        workers: jobs at a time. Of those that can start, the first goes first.
        on_epoch: told of each line that a job's history gains while it runs. on_done: of each job that ended.
        keep_going: a job's UserError ends it and those that need it, as `on_done` is told; else the first ends all.

    Raises:
        UserError: of a job, unless `keep_going`.
        RuntimeError: a bug in a job, with its traceback; it ends all.
    """
    by_name = {job.name: job for job in jobs}
    if len(by_name) != len(jobs):
        raise ValueError("two jobs of one name")
    schedule = Schedule({job.name: job.after for job in jobs})
    results: dict[str, dict[str, Any]] = {}
    running: list[_Running] = []

    def settle(job: Job, result: dict[str, Any] | UserError) -> None:
        progress.advance(overall)
        on_done(job, result)
        if not isinstance(result, UserError):
            results[job.name] = result
            schedule.succeed(job.name)
            return
        if not keep_going:
            raise result
        for name in schedule.fail(job.name):
            settle(by_name[name], UserError(f"needs {job.name}, which failed: {result}"))

    with bar() as progress, contextlib.ExitStack() as stack:
        stack.callback(_stop, running)
        overall = progress.add_task("all runs", total=len(jobs), visible=len(jobs) > workers)
        while True:
            while len(running) < max(1, workers) and (name := schedule.next()) is not None:
                running.append(_start(by_name[name], progress))
            if not running:
                return {job.name: results[job.name] for job in jobs if job.name in results}
            wait([one.connection for one in running], POLL_SECONDS)
            for one in list(running):
                ended = one.connection.poll()
                _report(one, progress, on_epoch)
                if ended:
                    running.remove(one)
                    progress.remove_task(one.task)
                    settle(one.job, _receive(one))


def _start(job: Job, progress: Progress) -> _Running:
    context = multiprocessing.get_context("spawn")  # a forked torch may wait for a thread that is not there
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job.work, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Running(job, process, ours, progress.add_task(job.name, total=job.epochs))


def _child(work: Callable[[], dict[str, Any]], connection: Connection) -> None:
    """The job's process: do the work, send what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(("done", work()))
    except UserError as error:
        connection.send(("refused", str(error)))
    except BaseException:
        connection.send(("broken", traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _receive(one: _Running) -> dict[str, Any] | UserError:
    try:
        kind, value = one.connection.recv()
    except EOFError:
        one.process.join()
        code = one.process.exitcode or 0
        how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return UserError(f"the process of {one.job.name} {how}{hint}; the same command goes on")
    finally:
        one.connection.close()
    one.process.join()
    if kind == "broken":
        raise RuntimeError(f"{one.job.name} failed:\n{value}")
    return UserError(value) if kind == "refused" else dict(value)


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.join()


def _report(one: _Running, progress: Progress, on_epoch: Callable[[Job, dict[str, Any]], None]) -> None:
    """Move the job's bar, and tell of the epochs since the last look."""
    history = _history(one.job.folder)
    for line in history[one.lines :]:
        on_epoch(one.job, line)
    if history:
        one.lines = len(history)
        progress.update(one.task, completed=len(history))


def _history(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
