"""The training loop: one loop for every defence.

    trainer = Trainer(model, defense, pairs, TrainConfig(epochs=16))
    for report in trainer.epochs():
        ...

A checkpoint can be taken after any step (`epochs(on_step=...)`). An epoch's order and augmentation are drawn from
generators seeded by (seed, epoch), and everything else that matters is in the checkpoint, so a run that is killed and
resumed ends with the same weights as a run that never was (same device, same number of processes).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from otcclip.defenses.base import Defense, EpochContext, EpochPlan, PairBatch, Step, TrainingPairs
from otcclip.errors import UserError
from otcclip.models.two_tower import TwoTower
from otcclip.training.augment import MILD, STRONG, Augmentation
from otcclip.training.batches import EpochBatches, Views
from otcclip.training.distributed import ALONE, World, average_gradients, synchronise_batch_norm
from otcclip.training.towers import SpreadTower
from otcclip.training.words import UsedWords

PRECISIONS = ("fp32", "amp", "amp_bf16", "amp_bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the demo's.

    Attributes:
        batch_size: pairs a step, over all processes and chunks: the contrastive batch.
        warmup: share of the phase over which the learning rate rises.
        precision: one of `PRECISIONS`, as in open_clip; `amp` is float16 with loss scaling.
        chunks: parts in which a process encodes its share of a batch (`towers.SpreadTower`), to save memory.
    """

    epochs: int = 16
    batch_size: int = 128
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: float = 0.08
    grad_clip: float = 1.0
    precision: str = "amp_bf16"
    seed: int = 0
    caption_crop: float = 0.5
    word_drop: float = 0.2
    chunks: int = 1
    augment: Augmentation = MILD
    warmup_augment: Augmentation = STRONG

    def views(self) -> Views:
        return Views(self.augment, self.warmup_augment, self.caption_crop, self.word_drop)


@dataclass(frozen=True)
class EpochReport:
    """What an epoch did: mean loss and terms, training seconds since the start (evaluation not counted), pairs trained
    on (those of a last short batch are not)."""

    epoch: int
    phase: str
    loss: float
    terms: Mapping[str, float]
    seconds: float
    visited: int


@dataclass
class _Place:
    """Where in an epoch a run is: what cannot be drawn again from (seed, epoch)."""

    plan: EpochPlan
    step: int
    generator: torch.Tensor
    totals: dict[str, float]


class Trainer:
    """Drives a `Defense` over `TrainingPairs`.

    Args:
        world: this process among those that share each batch. Every process is given the same model, defence, pairs and
            settings.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self, model: TwoTower, defense: Defense, pairs: TrainingPairs, config: TrainConfig, world: World = ALONE
    ) -> None:
        if config.precision not in PRECISIONS:
            raise UserError(f"--precision {config.precision!r}: one of {', '.join(PRECISIONS)}")
        self.model, self.defense, self.pairs, self.config, self.world = model, defense, pairs, config, world
        synchronise_batch_norm(model, world)
        spread = world.size > 1 or config.chunks > 1
        self._spread = SpreadTower(model, world, config.chunks) if spread else None
        self._words = UsedWords(model, pairs.tokens)
        self._parameters = self._words.among(list(model.parameters()))
        self.optimizer = _optimizer(self._parameters, config)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "amp")
        self.epoch = 0
        self.seconds = 0.0
        self._place: _Place | None = None
        self._resumed_random: torch.Tensor | None = None

    @property
    def tower(self) -> TwoTower:
        """What a defence is handed as its model."""
        return self.model if self._spread is None else self._spread  # type: ignore[return-value]

    @property
    def total_epochs(self) -> int:
        return self.defense.warmup_epochs + self.config.epochs

    @property
    def steps_done(self) -> int:
        """Steps of the current epoch that lie behind."""
        return 0 if self._place is None else self._place.step

    def epochs(self, on_step: Callable[[], None] | None = None) -> Iterator[EpochReport]:
        """Train from where the run is to the last epoch, yielding after each.

        `on_step` is called after every step but an epoch's last; a checkpoint can be taken there. Its time is not
        counted.
        """
        while self.epoch < self.total_epochs:
            report = self._epoch(on_step)
            self.epoch += 1
            self._place = None
            yield replace(report, seconds=self.seconds)

    def _epoch(self, on_step: Callable[[], None] | None) -> EpochReport:
        with torch.random.fork_rng():
            start = time.perf_counter()
            if self._place is None:
                torch.manual_seed(self.config.seed * 100_003 + self.epoch)
                self.model.eval()
                context = EpochContext(self.epoch, self.total_epochs, self.config.seed, self.tower, self.pairs)
                # Ranks plan alike, but for the last bits on a GPU; one plan rules.
                self._place = _Place(
                    self.world.agreed(self.defense.begin_epoch(context)), 0, torch.empty(0, dtype=torch.uint8), {}
                )
            elif self._resumed_random is not None:
                torch.set_rng_state(self._resumed_random)
                self._resumed_random = None
            self.model.train()
            return self._steps(self._place, start, on_step)

    def _steps(self, place: _Place, start: float, on_step: Callable[[], None] | None) -> EpochReport:
        batches = EpochBatches(
            self.pairs,
            place.plan,
            self.config.views(),
            batch_size=self.config.batch_size,
            seed=self.config.seed * 1_000_003 + self.epoch,
            world=self.world,
            spread=self._spread is not None,
        )
        if len(place.generator):
            batches.generator.set_state(place.generator)
        for batch in batches.start(place.step):
            self._set_lr(place.plan, place.step / batches.count)
            step = self._step(batch)
            for name, value in {"loss": step.loss.detach(), **step.terms}.items():
                place.totals[name] = place.totals.get(name, 0.0) + float(value)
            if not math.isfinite(place.totals["loss"]):
                raise UserError(
                    f"the loss is not finite at epoch {self.epoch}, step {place.step}: lower --lr, or --precision fp32"
                )
            place.step += 1
            place.generator = batches.generator.get_state()
            start = self._count_time(start)
            if on_step is not None and place.step < batches.count:
                on_step()
                start = time.perf_counter()
        self._count_time(start)
        if not all(bool(weight.isfinite().all()) for weight in self._parameters):  # no loss comes after the last step
            raise UserError(f"the weights are not finite after epoch {self.epoch}: lower --lr, or --precision fp32")
        means = {name: value / max(place.step, 1) for name, value in place.totals.items()}
        loss = means.pop("loss", math.nan)
        return EpochReport(self.epoch, place.plan.phase, loss, means, self.seconds, place.step * batches.size)

    def _count_time(self, start: float) -> float:
        now = time.perf_counter()
        self.seconds += now - start
        return now

    def _step(self, batch: PairBatch) -> Step:
        with self._words.collected():
            with self._autocast(), self._attention():
                step = self.defense.step(batch, self.tower)
            self.optimizer.zero_grad(set_to_none=True)
            self._scaler.scale(step.loss).backward()
            if self._spread is not None:
                with self._autocast(), self._attention():
                    self._spread.replay()
        self._words.collect()
        average_gradients(self._parameters, self.world)
        self._scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._words.put()
        return step

    def _set_lr(self, plan: EpochPlan, fraction: float) -> None:
        """Linear warm-up and cosine decay over the phase, by share of epochs: an epoch may be of any length."""
        w = self.defense.warmup_epochs
        done, span = (self.epoch, w) if plan.phase == "warm-up" else (self.epoch - w, self.config.epochs)
        t = (done + fraction) / span
        warm = self.config.warmup
        scale = min(t / warm + 0.02, 1.0) if t < warm else 0.5 * (1 + math.cos(math.pi * (t - warm) / (1 - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * plan.lr_scale * scale

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """Plain attention on a CPU: for short captions the fused kernel's backward makes a step 1.17x as long."""
        if self.world.device.type != "cpu" or self.model.image_size > 96:
            return contextlib.nullcontext()
        return sdpa_kernel(SDPBackend.MATH)

    def _autocast(self) -> torch.autocast:
        kind = torch.float16 if self.config.precision == "amp" else torch.bfloat16
        return torch.autocast(self.world.device.type, kind, enabled=self.config.precision != "fp32")

    def state_dict(self) -> dict[str, Any]:
        """Everything that does not follow from (seed, epoch): tensors, numbers and strings; valid after any step."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "defense": self.defense.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
        }
        if self._place is not None and self._place.step > 0:
            state["place"] = {**asdict(self._place), "random": torch.get_rng_state()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._words.take()
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state.get("scaler", {}))
        self.defense.load_state_dict(state["defense"])
        self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])
        self._place = None
        if (place := state.get("place")) is not None:
            plan = EpochPlan(**place["plan"])
            self._place = _Place(plan, int(place["step"]), place["generator"], dict(place["totals"]))
            self._resumed_random = place["random"]


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with no decay on gains, biases and the temperature, as open_clip groups them."""
    decay = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
