"""What tests of runs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from otcclip.training import experiment
from otcclip.training.setting import RunSpec


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunSpec], None]:
    """Runs a spec until its first checkpoint is on disk, and dies there."""

    def run(spec: RunSpec) -> None:
        real = experiment.save_run

        def save_and_die(*args: Any, **about: str) -> None:
            real(*args, **about)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "save_run", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                experiment.run_experiment(spec)

    return run
