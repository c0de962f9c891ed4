"""A run cut after any step: what it saved there is enough to end with the same weights, for every defence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from otcclip import defenses
from otcclip.data.pairs import PairStore
from otcclip.defenses.base import TrainingPairs, training_pairs
from otcclip.models import create_two_tower
from otcclip.training.checkpoint import load_state, save_state
from otcclip.training.loop import TrainConfig, Trainer

SMALL = {"alpha": 0.1, "first_refresh": 1, "refresh": 5, "unimodal_epochs": 1, "slow_epochs": 0}
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=2e-3, seed=4)
CUTS = ((0, 2), (1, 1))


def fresh(name: str, pairs: TrainingPairs, seed: int = 0) -> Trainer:
    takes = inspect.signature(defenses.DEFENSES[name]).parameters
    options: dict[str, Any] = {option: value for option, value in SMALL.items() if option in takes}
    return Trainer(create_two_tower("otcclip-tiny", seed=seed), defenses.make(name, **options), pairs, CONFIG)


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore]) -> TrainingPairs:
    store = make_store(34, 16, own_caption=True)
    captions = (*store.captions[:26], *store.captions[30:], *store.captions[26:30])  # the last eight are false
    model = create_two_tower("otcclip-tiny", seed=0)
    return training_pairs(replace(store, captions=captions), model, store.keys[:6])


@pytest.mark.parametrize("name", defenses.DEFENSES)
def test_cut_after_any_step(name: str, pairs: TrainingPairs, tmp_path: Path) -> None:
    whole = fresh(name, pairs)
    saved: dict[tuple[int, int], Path] = {}

    def save() -> None:
        if (place := (whole.epoch, whole.steps_done)) in CUTS:
            saved[place] = tmp_path / f"{place}.pt"
            save_state(saved[place], whole.state_dict())

    reports = [(r.loss, r.terms, r.visited) for r in whole.epochs(save)]
    assert set(saved) == set(CUTS)
    weights = whole.model.state_dict()
    for place, path in saved.items():
        torch.manual_seed(99)
        again = fresh(name, pairs, seed=1)
        again.load_state_dict(load_state(path))
        assert (again.epoch, again.steps_done) == place
        assert [(r.loss, r.terms, r.visited) for r in again.epochs()] == reports[place[0] :]
        assert all(torch.equal(weights[k], v) for k, v in again.model.state_dict().items())


def test_no_pair_is_lost_or_seen_twice(pairs: TrainingPairs, tmp_path: Path) -> None:
    """The pairs of an epoch cut after each of its steps in turn are those of an epoch never cut, in order."""
    seen: list[int] = []

    def recording(run: Trainer) -> Trainer:
        step = run.defense.step
        run.defense.step = lambda batch, model: seen.extend(batch.index.tolist()) or step(batch, model)  # type: ignore
        return run

    list(recording(fresh("clip", pairs)).epochs())
    whole, seen = seen, []

    class Killed(Exception):
        pass

    def kill() -> None:
        save_state(tmp_path / "last.pt", run.state_dict())
        raise Killed

    run = recording(fresh("clip", pairs))
    for _ in range(20):
        try:
            list(run.epochs(kill))
            break
        except Killed:
            run = recording(fresh("clip", pairs))
            run.load_state_dict(load_state(tmp_path / "last.pt"))
    assert seen == whole and len(set(seen[:32])) == 32


def test_time_at_a_checkpoint_is_not_training_time(pairs: TrainingPairs) -> None:
    import time

    run = fresh("clip", pairs)
    start = time.perf_counter()
    list(run.epochs(lambda: time.sleep(0.2)))
    assert run.seconds < time.perf_counter() - start - 6 * 0.2 + 0.1
