"""One run: one defence on one poisoned corpus with one seed, from shards to `result.json`, resumable.

    result = run_experiment(RunSpec(corpus="corpora/emoji", out="runs/demo", defense="otcclip"))

Files: docs/formats.md. A finished run of the same spec is returned as it stands; one that was cut off goes on from its
last epoch. A run of another spec is begun anew where it was cut off, and refused where it was finished. A fine-tuning
defence starts from another finished run (`start_of`).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from otcclip.data.atomic import write_json
from otcclip.defenses import make as make_defense
from otcclip.defenses.base import training_pairs
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower, load_two_tower
from otcclip.training.checkpoint import LAST, load_state, restore_run, save_run, write_history
from otcclip.training.judge import Judge
from otcclip.training.loop import EpochReport, Trainer
from otcclip.training.outcome import verdict, write_outcome
from otcclip.training.setting import (
    RunSpec,
    Setting,
    clean_reference,
    make_setting,
    start_of,
    train_config,
    trusted_keys,
)
from otcclip.training.writers import Writers

__all__ = [
    "RunSpec",
    "check_free",
    "clean_reference",
    "finished_result",
    "make_setting",
    "run_experiment",
    "start_of",
]

DIFFERENCES = 4  # that a line on another spec names
CHECKPOINT_SECONDS = 30.0  # training that a kill may cost; a checkpoint of 100 MB every epoch would cost 3 %


def run_experiment(spec: RunSpec, on_setting: Callable[[Setting], None] | None = None) -> dict[str, Any]:
    """Train, judge and write one run; returns its object for `results.json`.

    Args:
        on_setting: shown the poisoned corpus before any training; not called where the run is finished already.

    Raises:
        UserError: what cannot be trained; or the folder holds a finished run of another spec.
    """
    torch.set_num_threads(spec.threads)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a model to be trained has no weights yet
    folder = spec.folder
    done = finished_result(spec)
    if done is not None:
        return done
    defense = make_defense(spec.defense, **spec.options)
    model = _first_model(spec)
    _claim(folder, spec)
    setting = make_setting(spec, model.image_size)
    if on_setting is not None:
        on_setting(setting)
    trusted = None if start_of(spec) is None else trusted_keys(spec, setting)
    pairs = training_pairs(setting.train.without_labels(), model, trusted)
    trainer = Trainer(model, defense, pairs, train_config(spec, defense))
    judge = Judge(setting.split.test, setting.split.names, setting.attacks, setting.plans)
    history = _resume(folder, spec, trainer)
    saved = float("-inf")  # the first epoch is saved at once: it holds the evidence, the costly part to lose
    with Writers("tensorboard", folder, trainer.epoch) as writers:
        for report in trainer.epochs():
            line = {**_line(report), **verdict(trainer, pairs, setting)}
            if _is_evaluated(report.epoch, trainer.total_epochs):
                line |= judge.evaluate(model)
            history.append(line)
            writers.write(line)
            write_history(folder, history)
            if trainer.seconds - saved >= CHECKPOINT_SECONDS or report.epoch == trainer.total_epochs - 1:
                save_run(folder / LAST, trainer, history, spec=json.dumps(spec.identity(), sort_keys=True))
                saved = trainer.seconds
    model.eval()
    return write_outcome(spec, trainer, judge, setting, pairs, history)


def _is_evaluated(epoch: int, total: int) -> bool:
    every = max(1, total // 8)
    return epoch == total - 1 or epoch % every == every - 1


def _line(report: EpochReport) -> dict[str, Any]:
    line = {k: getattr(report, k) for k in ("epoch", "phase", "loss", "seconds", "visited")}
    return {**line, "terms": dict(report.terms)}


def _is_of(folder: Path, spec: RunSpec) -> bool:
    try:
        return bool(json.loads((folder / "spec.json").read_text()) == spec.identity())
    except (OSError, ValueError):
        return False


def finished_result(spec: RunSpec) -> dict[str, Any] | None:
    """The result of a finished run of this very spec."""
    try:
        return dict(json.loads((spec.folder / "result.json").read_text())) if _is_of(spec.folder, spec) else None
    except (OSError, ValueError):
        return None


def check_free(spec: RunSpec) -> None:
    """Raises UserError where the run's folder holds a finished run of another spec: no training is deleted unasked."""
    if _is_of(spec.folder, spec) or not (spec.folder / "result.json").exists():
        return
    now = spec.identity()
    try:
        was = dict(json.loads((spec.folder / "spec.json").read_text()))
        other = [_differing(name, was[name], now.get(name)) for name in was if was[name] != now.get(name)]
    except (OSError, ValueError, TypeError):
        other = ["its spec.json cannot be read"]
    why = ", ".join(other[:DIFFERENCES]) or "of an older version"
    raise UserError(f"{spec.folder} holds a finished run of another spec ({why}): name another --out, or delete it")


def _differing(name: str, was: Any, now: Any) -> str:
    """In words; what is long is named alone."""
    plain = isinstance(was, str | int | float) and isinstance(now, str | int | float)
    return f"{name} {was}, not {now}" if plain else f"other {name}"


def _claim(folder: Path, spec: RunSpec) -> None:
    """Make the folder this spec's; what another spec's run that was cut off left there is cleared.

    Raises:
        UserError: it holds a finished run of another spec.
    """
    if _is_of(folder, spec):
        return
    check_free(spec)
    if (folder / "spec.json").exists():  # only a folder that a run made is ever removed
        shutil.rmtree(folder)
    write_json(folder / "spec.json", spec.identity())


def _first_model(spec: RunSpec) -> TwoTower:
    """A new model, or the finished one that the defence is to mend."""
    start = start_of(spec)
    if start is None:
        return create_two_tower(spec.model, seed=spec.seed)
    if finished_result(start) is None:
        raise UserError(
            f"{spec.defense}: starts from a finished run of {start.defense} with the same settings, and "
            f"{start.folder} holds none; run that first"
        )
    return load_two_tower(start.folder, spec.model)


def _resume(folder: Path, spec: RunSpec, trainer: Trainer) -> list[dict[str, Any]]:
    path = folder / LAST
    if not path.exists():
        return []
    state = load_state(path)
    if state.get("spec") != json.dumps(spec.identity(), sort_keys=True):
        return []  # left by another run whose folder was cleared halfway: begin anew
    return restore_run(path, trainer, state)
