"""A matrix on the small corpus, its jobs run one by one in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from otcclip.bench import matrix
from otcclip.errors import UserError
from otcclip.training.fleet import Job, Schedule


def in_turn(
    jobs: Sequence[Job],
    workers: int,
    *,
    on_done: Callable[[Job, dict[str, Any] | UserError], None],
    keep_going: bool,
) -> None:
    """What `run_fleet` promises, without processes."""
    assert workers >= 1 and keep_going
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == len(jobs)
    schedule = Schedule({job.name: job.after for job in jobs})
    while (name := schedule.next()) is not None:
        try:
            result = by_name[name].work()
        except UserError as error:
            on_done(by_name[name], error)
            for lost in schedule.fail(name):
                on_done(by_name[lost], UserError(f"needs {name}, which failed: {error}"))
        else:
            schedule.succeed(name)
            on_done(by_name[name], result)


@pytest.fixture(scope="package")
def one_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "run_fleet", in_turn)
        yield


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """A run silences the root logger and sets the threads of its process, which here is everybody's."""
    level, threads = logging.getLogger().level, torch.get_num_threads()
    yield
    logging.getLogger().setLevel(level)
    torch.set_num_threads(threads)
