"""One training run on a user's own pairs: what `otcclip train` and `python -m otcclip.train` do.

    result = train(TrainSpec("shards/{00000..00041}.tar", model="RN50", defense="otcclip", batch_size=256))

A run's folder is `LOGS/NAME`: `run.json` (the settings), `skipped.parquet`, `history.jsonl`, `checkpoint/last.pt`,
`pairs.state` (what the defence holds of each pair, by key, as of the last epoch) and, once finished,
`decisions.parquet` (the same in words), the model for open_clip and `result.json`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from otcclip import defenses
from otcclip.data.atomic import write_json
from otcclip.data.index import PairData, copy_skipped, open_pairs
from otcclip.data.manifest import read_manifest
from otcclip.data.readers import ReadOptions
from otcclip.data.state import StateTable
from otcclip.defenses.base import Defense, FineTuner, TrainingPairs, trusted_mask
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower, save_open_clip
from otcclip.specs import Spec, options_of
from otcclip.training.checkpoint import LAST, load_state, restore_run, save_run, write_history
from otcclip.training.distributed import World, join, leave
from otcclip.training.evaluate import EvalSpec, evaluate_model, open_evaluation
from otcclip.training.loop import TrainConfig, Trainer
from otcclip.training.pair_state import contents, put_state, state_table, write_decisions
from otcclip.training.speed import checkpoint_activations, compile_towers
from otcclip.training.train_spec import TrainSpec
from otcclip.training.writers import Writers


def train(spec: TrainSpec) -> dict[str, Any]:
    """Train, evaluate and write one run; returns its `result.json`. Under `torchrun`, one of its processes.

    Raises:
        UserError: whatever the user can mend, in one line; checkpoints already written stay whole.
    """
    spec.check()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a model to be trained has no weights yet
    world = join(spec.device)
    try:
        return _Run(spec, world).go()
    finally:
        leave()


class _Run:
    def __init__(self, spec: TrainSpec, world: World) -> None:
        self.spec, self.world, self.folder = spec, world, spec.folder
        state = self._checkpoint()
        self.model = create_two_tower(spec.model, spec.pretrained, seed=spec.seed).to(world.device)
        if spec.grad_checkpointing:
            checkpoint_activations(self.model)
        if world.is_first and (asked := self._validation()) is not None:
            open_evaluation(asked, self.model.image_size, self._cache)  # or a misspelt name costs the first epoch
        self.data = self._open(spec.train_data)
        if spec.manifest is not None:
            self.data = self.data.under(read_manifest(spec.manifest))
        self.data = self.data.in_key_order()
        self.pairs = training_pairs_of(self.data, self.model, spec.trusted)
        self._contents = contents(self.pairs)
        self._check_pairs(state)
        self.trainer = Trainer(self.model, make_defense(spec), self.pairs, self._config(), world)
        if spec.torchcompile:
            compile_towers(self.model)
        self.history: list[dict[str, Any]] = []
        self._saved = time.monotonic()
        if state is not None:
            self.history = restore_run(self._resumed, self.trainer, state)

    def go(self) -> dict[str, Any]:
        if self.world.is_first:
            copy_skipped(self.data, self.folder / "skipped.parquet")
            write_json(self.folder / "run.json", asdict(self.spec))
        with Writers(
            self.spec.report_to if self.world.is_first else "none", self.folder, self.trainer.epoch
        ) as writers:
            for report in self.trainer.epochs(self._maybe_save):
                line = {**asdict(report), "terms": dict(report.terms), "pairs_per_second": self._speed(report.visited)}
                if self.world.is_first:
                    line |= self._evaluate(report.epoch)
                    writers.write(line)
                    put_state(self._state_table, self.trainer.defense.decisions(self.pairs))
                self.history.append(line)
                self._save()
                self.world.barrier()  # or a long evaluation would look like a dead rank
        return self._finish() if self.world.is_first else {}

    def _config(self) -> TrainConfig:
        spec = self.spec
        batch = min(spec.global_batch(self.world.size), len(self.pairs))
        steps = max(1, spec.epochs * (len(self.pairs) // batch))
        warmup = TrainConfig.warmup if spec.warmup is None else min(1.0, spec.warmup / steps)
        return TrainConfig(
            epochs=spec.epochs,
            batch_size=spec.global_batch(self.world.size),
            lr=spec.lr,
            weight_decay=spec.wd,
            warmup=warmup,
            grad_clip=spec.grad_clip_norm,
            precision=spec.precision,
            seed=spec.seed,
            chunks=spec.accum_freq,
        )

    def _open(self, source: str) -> PairData:
        """Rank 0 makes the index, the others open it."""

        def opened() -> PairData:
            return open_pairs(
                source,
                self.spec.dataset_type,
                self.model.image_size,
                self._cache,
                options=read_options(self.spec),
                max_bad=self.spec.max_bad,
                workers=self.spec.workers,
                decoded_gib=self.spec.decoded_gib,
                limit=self.spec.limit,
            )

        data = opened() if self.world.is_first else None
        self.world.barrier()
        return opened() if data is None else data

    def _checkpoint(self) -> dict[str, Any] | None:
        """The state to take up, or None for a new run."""
        path = self._resumed
        goes_on_here = self.spec.resume is not None and path.resolve() == (self.folder / LAST).resolve()
        if not goes_on_here and ((self.folder / LAST).exists() or (self.folder / "result.json").exists()):
            raise UserError(f"{self.folder} holds a run: --resume latest goes on with it; or take another --name")
        if self.spec.resume is None:
            return None
        if not path.exists():
            if self.spec.resume == "latest":
                return None  # cut off before its first checkpoint: the same command starts it
            raise UserError(f"--resume {path}: no such checkpoint")
        state = load_state(path)
        try:
            was = json.loads(state["identity"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a checkpoint of `otcclip train`") from error
        now = json.loads(json.dumps(self.spec.identity(self.world.size)))
        if changed := [name for name in now if was.get(name) != now[name]]:
            name = changed[0]
            raise UserError(f"{path}: made with {name} {was.get(name)!r}, now it is {now[name]!r}; use another --name")
        return state

    @cached_property
    def _state_table(self) -> StateTable:
        return state_table(self.folder / "pairs.state", self.pairs)

    @property
    def _cache(self) -> Path:
        return Path(self.spec.logs) / ".pairs"

    @property
    def _resumed(self) -> Path:
        """The checkpoint that `--resume` means."""
        return self.folder / LAST if self.spec.resume in (None, "latest") else Path(self.spec.resume)

    def _check_pairs(self, state: dict[str, Any] | None) -> None:
        """What a checkpoint knows of row i must be of the pair that is row i now."""
        if state is None or state.get("pairs") == self._contents:
            return
        was = str(state.get("pairs", "unknown")).split(":")[0]
        raise UserError(
            f"{self._resumed}: made with other pairs (then {was}, now {len(self.pairs)}, or with other captions); "
            "use another --name"
        )

    def _maybe_save(self) -> None:
        due = time.monotonic() - self._saved >= self.spec.save_seconds
        if due:  # each rank looks at its own clock; only the first one's matters
            self._save()

    def _save(self) -> None:
        self._saved = time.monotonic()
        if not self.world.is_first:
            return
        write_history(self.folder, self.history)
        identity = json.dumps(self.spec.identity(self.world.size))
        save_run(self.folder / LAST, self.trainer, self.history, identity=identity, pairs=self._contents)

    def _speed(self, visited: int) -> float:
        before = self.history[-1]["seconds"] if self.history else 0.0
        return round(visited / max(self.trainer.seconds - before, 1e-9), 1)

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        asked, every = self._validation(), self.spec.val_frequency
        if asked is None or not (epoch == self.trainer.total_epochs - 1 or epoch % every == every - 1):
            return {}
        rows = evaluate_model(self.model, asked, self._cache, str(self.folder))
        return {"eval": {row["task"]: row["metrics"] for row in rows}}

    def _validation(self) -> EvalSpec | None:
        """What is evaluated on while it trains; None for nothing."""
        spec = self.spec
        if spec.val_data is None:
            return None
        return EvalSpec(
            spec.val_data,
            spec.dataset_type,
            spec.val_classnames,
            read_options(spec),
            spec.workers,
            max_bad=spec.max_bad,
        )

    def _finish(self) -> dict[str, Any]:
        self.model.eval()
        save_open_clip(self.model, self.folder)
        write_decisions(self.folder / "decisions.parquet", self.trainer.defense.decisions(self.pairs), self.pairs)
        last = self.history[-1]
        result = {
            "model": self.spec.model,
            "pretrained": str(self.folder / "open_clip_model.safetensors"),
            "defense": self.spec.defense,
            "seed": self.spec.seed,
            "pairs": len(self.pairs),
            "skipped": self.data.skipped,
            "epochs": self.trainer.total_epochs,
            "seconds": round(self.trainer.seconds, 1),
            "loss": last["loss"],
            **({"eval": last["eval"]} if "eval" in last else {}),
        }
        write_json(self.folder / "result.json", result)
        return result


def make_defense(spec: TrainSpec) -> Defense:
    """The defence that the spec names.

    Raises:
        UserError: no such defence or option; a fine-tuner without a model to mend or pairs to mend it with, or with a
            budget other than the run's.
    """
    asked = Spec.parse(spec.defense)
    made = defenses.make(asked.name, **options_of("defence", defenses.DEFENSES, asked))
    if isinstance(made, FineTuner) and (spec.pretrained is None or spec.trusted is None):
        raise UserError(f"--defense {asked.name} mends a finished model: it takes --pretrained and --trusted")
    if isinstance(made, FineTuner) and ("lr" in asked or "epoch_share" in asked):
        raise UserError(f"--defense {asked}: its budget is --lr and --epochs here; leave lr and epoch_share out")
    return made


def read_options(spec: TrainSpec) -> ReadOptions:
    return ReadOptions(spec.csv_img_key, spec.csv_caption_key, spec.csv_separator, spec.image_root, spec.crop_regions)


def training_pairs_of(data: PairData, model: TwoTower, trusted: str | None = None) -> TrainingPairs:
    """Pairs as a defence sees them: every distinct caption tokenised once, no label."""
    captions, number = data.table.caption_numbers()
    keys = data.table.keys
    tokens = torch.cat([model.tokenize(captions[i : i + 65536]) for i in range(0, len(captions), 65536)])
    vouched = None
    if trusted is not None:
        try:
            vouched = trusted_mask(keys, Path(trusted).read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--trusted {trusted}: cannot read: {error}") from error
    return TrainingPairs(keys, data.images, captions, tokens, torch.from_numpy(number), vouched)
