"""One run: one defence on one poisoned corpus with one seed, from shards to `result.json`, resumable.

    result = run_experiment(RunSpec(corpus="corpora/emoji", out="runs/demo", defense="otcclip"))

Files: docs/formats.md. A finished run of the same spec is returned as it stands; one that was cut off goes on from its
last epoch; a folder of another spec is begun anew.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.tensorboard import SummaryWriter

from otcclip import __version__, attacks
from otcclip.attacks import Attack, PoisonPlan, PoisonRecord
from otcclip.data.atomic import atomic_file, write_json, write_text
from otcclip.data.emoji_load import EmojiSplit, load_emoji
from otcclip.data.pairs import PairStore
from otcclip.defenses import make as make_defense
from otcclip.defenses.base import ACTIONS, HOLD_BACK, KEEP, REPAIR, Decisions, TrainingPairs, training_pairs
from otcclip.errors import UserError
from otcclip.evaluation.detection import detection
from otcclip.models import create_two_tower, save_open_clip
from otcclip.registry import find
from otcclip.training.checkpoint import load_state, save_state
from otcclip.training.judge import Judge, png
from otcclip.training.loop import EpochReport, TrainConfig, Trainer

SHOWN_PAIRS = 2000
CHECKPOINT_SECONDS = 30.0  # training that a kill may cost; a checkpoint of 100 MB every epoch would cost 3 %


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's result.

    Attributes:
        corpus: folder of the emoji corpus. out: folder the run's own folder goes into.
        options: the defence's own options, by name; its defaults where empty.
        name: the run's folder and its name in tables; the defence's name by default.
        poisoned: whether the attacks are planted; they are tried at test time either way.
    """

    corpus: str
    out: str
    defense: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    hold_out: str | None = None
    target: str = "banana"
    attacks: tuple[str, ...] = ("badnets", "targeted")
    seed: int = 0
    epochs: int = 16
    batch_size: int = 128
    lr: float = 1.5e-3
    model: str = "otcclip-tiny"
    poisoned: bool = True
    threads: int = 1

    @property
    def folder(self) -> Path:
        return Path(self.out) / (self.name or self.defense)

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed or reused."""
        spec = {k: v for k, v in asdict(self).items() if k not in ("out", "threads", "corpus")}
        return {**json.loads(json.dumps(spec)), "version": __version__}


def make_attacks(spec: RunSpec) -> tuple[Attack, ...]:
    """The spec's attacks; those with a trigger argue for the spec's target."""
    for name in spec.attacks:
        find("attack", attacks.ATTACKS, name)
    return tuple(
        attacks.make(name, target=spec.target) if attacks.ATTACKS[name].has_trigger else attacks.make(name)
        for name in spec.attacks
    )


@dataclass(frozen=True)
class Setting:
    """A poisoned corpus with everything needed to judge what was learned from it."""

    split: EmojiSplit
    train: PairStore
    records: tuple[PoisonRecord, ...]
    plans: tuple[PoisonPlan, ...]
    attacks: tuple[Attack, ...]


def make_setting(spec: RunSpec, image_size: int) -> Setting:
    """Load the corpus and plant the poison; the same spec gives the same pairs in every process."""
    split = load_emoji(spec.corpus, image_size, spec.hold_out)
    chosen = make_attacks(spec)
    poisoned = attacks.poison(split.train, split.test, chosen, spec.seed)
    if not spec.poisoned:
        return Setting(split, split.train, (), poisoned.plans, chosen)
    return Setting(split, poisoned.store, poisoned.records, poisoned.plans, chosen)


def run_experiment(spec: RunSpec) -> dict[str, Any]:
    """Train, judge and write one run; returns its object for `results.json`."""
    torch.set_num_threads(spec.threads)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a model to be trained has no weights yet
    folder = spec.folder
    done = _finished(folder, spec)
    if done is not None:
        return done
    model = create_two_tower(spec.model, seed=spec.seed)
    setting = make_setting(spec, model.image_size)
    pairs = training_pairs(setting.train.without_labels(), model)
    config = TrainConfig(epochs=spec.epochs, batch_size=spec.batch_size, lr=spec.lr, seed=spec.seed)
    trainer = Trainer(model, make_defense(spec.defense, **spec.options), pairs, config)
    judge = Judge(setting.split.test, setting.split.names, setting.attacks, setting.plans)
    history = _resume(folder, spec, trainer)
    saved = float("-inf")  # the first epoch is saved at once: it holds the evidence, the costly part to lose
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=trainer.epoch)
    for report in trainer.epochs():
        line = {**_line(report), **_verdict(trainer, pairs, setting)}
        if _is_evaluated(report.epoch, trainer.total_epochs):
            line |= judge.evaluate(model)
        history.append(line)
        _to_board(board, line)
        write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        if trainer.seconds - saved >= CHECKPOINT_SECONDS or report.epoch == trainer.total_epochs - 1:
            extra = {"history": json.dumps(history), "spec": json.dumps(spec.identity(), sort_keys=True)}
            save_state(folder / "checkpoint" / "last.pt", {**trainer.state_dict(), **extra})
            saved = trainer.seconds
    board.close()
    model.eval()
    return _finish(spec, trainer, judge, setting, pairs, history)


def _is_evaluated(epoch: int, total: int) -> bool:
    every = max(1, total // 8)
    return epoch == total - 1 or epoch % every == every - 1


def _line(report: EpochReport) -> dict[str, Any]:
    line = {k: getattr(report, k) for k in ("epoch", "phase", "loss", "seconds", "visited")}
    return {**line, "terms": dict(report.terms)}


def _to_board(board: SummaryWriter, line: dict[str, Any]) -> None:
    """Every number of a history line as a tensorboard scalar, nested names joined by slashes."""

    def scalars(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from scalars(f"{prefix}/{name}" if prefix else name, inner)
        elif isinstance(value, int | float):
            yield prefix, float(value)

    for name, value in scalars("", line):
        board.add_scalar(name, value, line["epoch"])
    board.flush()


def _finished(folder: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The result of a finished run of this very spec; a folder of another spec is cleared."""
    try:
        same = json.loads((folder / "spec.json").read_text()) == spec.identity()
    except (OSError, ValueError):
        same = False
    if not same:
        if (folder / "spec.json").exists():  # only a folder that a run made is ever removed
            shutil.rmtree(folder)
        write_json(folder / "spec.json", spec.identity())
        return None
    try:
        return dict(json.loads((folder / "result.json").read_text()))
    except (OSError, ValueError):
        return None


def _resume(folder: Path, spec: RunSpec, trainer: Trainer) -> list[dict[str, Any]]:
    path = folder / "checkpoint" / "last.pt"
    if not path.exists():
        return []
    state = load_state(path)
    if state.get("spec") != json.dumps(spec.identity(), sort_keys=True):
        return []  # left by another run whose folder was cleared halfway: begin anew
    try:
        trainer.load_state_dict(state)
        return list(json.loads(state["history"]))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: checkpoint lacks parts or does not fit; delete it to start over") from error


def _verdict(trainer: Trainer, pairs: TrainingPairs, setting: Setting) -> dict[str, Any]:
    """What the defence decided, held against the ground truth that it never saw."""
    decisions = trainer.defense.decisions(pairs)
    counts = np.bincount(decisions.action, minlength=3)
    out: dict[str, Any] = {
        "kept": int(counts[KEEP]),
        "repaired": int(counts[REPAIR]),
        "held_back": int(counts[HOLD_BACK]),
    }
    if not setting.records:
        return out
    attack_of = {record.key: record.attack for record in setting.records}
    planted = np.array([attack_of.get(key, "") for key in pairs.keys])
    names = dict.fromkeys(record.attack for record in setting.records)
    out["poison_kept"] = {a: int(((planted == a) & (decisions.action == KEEP)).sum()) for a in names}
    if not np.isnan(decisions.suspicion).any():
        honest = planted == ""
        out["trust_auroc"] = {
            a: detection(decisions.suspicion[honest | (planted == a)], (planted == a)[honest | (planted == a)]).auroc
            for a in names
        }
    precision = _repair_precision(decisions, pairs, setting)
    return out if precision is None else {**out, "repair_precision": precision}


def _repair_precision(decisions: Decisions, pairs: TrainingPairs, setting: Setting) -> float | None:
    """Share of re-paired images whose new caption is a caption of what they really show."""
    rows = np.nonzero(decisions.action == REPAIR)[0]
    if not len(rows) or not setting.train.labels:
        return None
    spoken = set(zip(setting.split.train.labels, setting.split.train.captions, strict=True))
    right = [(setting.train.labels[i], pairs.captions[decisions.caption_of[i]]) in spoken for i in rows]
    return float(np.mean(right))


def _finish(
    spec: RunSpec,
    trainer: Trainer,
    judge: Judge,
    setting: Setting,
    pairs: TrainingPairs,
    history: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Write the model, the pictures and, last of all, the result that marks the run as finished."""
    folder, model = spec.folder, trainer.model
    save_open_clip(model, folder)
    _write_rows(folder / "gallery.parquet", judge.gallery(model, spec.seed))
    _write_rows(folder / "pairs.parquet", _judged_pairs(spec, trainer, pairs, setting))
    last = history[-1]
    total: dict[str, int] = {}
    for record in setting.records:
        total[record.attack] = total.get(record.attack, 0) + 1
    result = {
        "defense": spec.name or spec.defense,
        "seed": spec.seed,
        "epochs": spec.epochs,
        "top1": last["top1"],
        "top5": last["top5"],
        "attacks": last["attacks"],
        "clean_asr": None,
        "seconds": round(trainer.seconds, 1),
        "pairs_kept": last["kept"],
        "pairs_repaired": last["repaired"],
        "poison_kept": last.get("poison_kept", {}),
        "pairs_total": len(pairs),
        "poison_total": total,
        "n": len(judge.test),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "dataset": f"emoji/{setting.split.hold_out}",
        "model": spec.model,
        "pretrained": str(folder / "open_clip_model.safetensors"),
        "task": "zeroshot_classification",
        "metrics": {"acc1": last["top1"], "acc5": last["top5"]},
    }
    write_json(folder / "result.json", result)
    return result


def _judged_pairs(spec: RunSpec, trainer: Trainer, pairs: TrainingPairs, setting: Setting) -> list[dict[str, Any]]:
    """Every poison pair, and the honest pairs re-paired or held back (a seeded sample beyond SHOWN_PAIRS)."""
    decisions = trainer.defense.decisions(pairs)
    attack_of = {record.key: record.attack for record in setting.records}
    poison = [i for i, key in enumerate(pairs.keys) if key in attack_of]
    judged = [i for i in np.nonzero(decisions.action != KEEP)[0].tolist() if pairs.keys[i] not in attack_of]
    room = max(0, SHOWN_PAIRS - len(poison))
    if len(judged) > room:
        judged = sorted(np.random.default_rng(spec.seed).choice(judged, room, replace=False).tolist())
    rows = []
    for i in [*poison, *judged]:
        repaired = decisions.action[i] == REPAIR
        rows.append(
            {
                "key": pairs.keys[i],
                "image": png(setting.train.images[i]),
                "caption": setting.train.captions[i],
                "new_caption": pairs.captions[decisions.caption_of[i]] if repaired else None,
                "action": ACTIONS[decisions.action[i]],
                "suspicion": float(decisions.suspicion[i]),
                "attack": attack_of.get(pairs.keys[i], ""),
                "true_name": setting.train.labels[i],
            }
        )
    return rows


_COLUMNS = {
    "image": pa.binary(),
    "clean_image": pa.binary(),
    "confidence": pa.float64(),
    "suspicion": pa.float64(),
}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    schema = pa.schema([(name, _COLUMNS.get(name, pa.string())) for name in rows[0]])
    with atomic_file(path) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), handle)


def clean_reference(spec: RunSpec) -> RunSpec:
    """The undefended run on the same corpus without poison: the rates that no attack has earned."""
    return replace(spec, defense="clip", name="clip-clean", poisoned=False)
