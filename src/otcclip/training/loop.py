"""The training loop: one loop for every defence.

    trainer = Trainer(model, defense, pairs, TrainConfig(epochs=16))
    for report in trainer.epochs():
        ...

An epoch's order and augmentation are drawn from generators seeded by (seed, epoch), and everything else that matters is
in the checkpoint, so a run that is killed and resumed ends with the same weights as a run that never was (same device).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from otcclip.defenses.base import Defense, EpochContext, EpochPlan, PairBatch, TrainingPairs
from otcclip.models.two_tower import TwoTower
from otcclip.training.augment import MILD, STRONG, Augment, crop_captions, drop_words


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are the demo's."""

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
    augment: Augment = MILD
    warmup_augment: Augment = STRONG


@dataclass(frozen=True)
class EpochReport:
    """What an epoch did: mean loss and terms, training seconds since the start (evaluation not counted)."""

    epoch: int
    phase: str
    loss: float
    terms: Mapping[str, float]
    seconds: float
    visited: int


class Trainer:
    """Drives a `Defense` over `TrainingPairs`."""

    def __init__(self, model: TwoTower, defense: Defense, pairs: TrainingPairs, config: TrainConfig) -> None:
        self.model, self.defense, self.pairs, self.config = model, defense, pairs, config
        self.optimizer = _optimizer(model, config)
        self.epoch = 0
        self.seconds = 0.0

    @property
    def total_epochs(self) -> int:
        return self.defense.warmup_epochs + self.config.epochs

    def epochs(self) -> Iterator[EpochReport]:
        """Train from the current epoch to the last, yielding after each."""
        while self.epoch < self.total_epochs:
            start = time.perf_counter()
            report = self._epoch()
            self.seconds += time.perf_counter() - start
            self.epoch += 1
            yield replace(report, seconds=self.seconds)

    def _epoch(self) -> EpochReport:
        context = EpochContext(self.epoch, self.total_epochs, self.config.seed, self.model, self.pairs)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed * 100_003 + self.epoch)
            self.model.eval()
            plan = self.defense.begin_epoch(context)
            self.model.train()
            return self._steps(plan)

    def _steps(self, plan: EpochPlan) -> EpochReport:
        totals: dict[str, float] = {}
        steps = 0
        for fraction, batch in self._batches(plan):
            self._set_lr(plan, fraction)
            with self._autocast(), self._attention():
                step = self.defense.step(batch, self.model)
            self.optimizer.zero_grad(set_to_none=True)
            step.loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            for name, value in {"loss": step.loss.detach(), **step.terms}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            steps += 1
        means = {name: value / max(steps, 1) for name, value in totals.items()}
        loss = means.pop("loss", math.nan)
        return EpochReport(self.epoch, plan.phase, loss, means, self.seconds, len(plan.index))

    def _batches(self, plan: EpochPlan) -> Iterator[tuple[float, PairBatch]]:
        """Batches of an epoch with the share of it that lies behind; a last short batch is dropped, as in open_clip."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        order = plan.index[torch.randperm(len(plan.index), generator=generator)]
        b = min(self.config.batch_size, len(order))
        count = len(order) // b if b else 0
        for i in range(count):
            index = order[i * b : (i + 1) * b]
            raw = self.pairs.images[index]
            images = tuple(self._image_view(plan, view)(raw, generator) for view in range(plan.views))
            unique, caption = torch.unique(plan.caption_of[index], return_inverse=True)
            if len(unique) and unique[0] < 0:
                unique, caption = unique[1:], caption - 1
            texts = tuple(self._caption_view(plan, view, unique, generator) for view in range(plan.text_views))
            apart = None if plan.apart is None else plan.apart[index]
            yield i / count, PairBatch(index, images, texts[0], caption, texts[1:], apart)

    def _image_view(self, plan: EpochPlan, view: int) -> Augment:
        strong = plan.phase == "warm-up" or _is_strong(plan, view)
        return self.config.warmup_augment if strong else self.config.augment

    def _caption_view(self, plan: EpochPlan, view: int, captions: Tensor, generator: torch.Generator) -> Tensor:
        tokens = crop_captions(self.pairs.tokens[captions], self.config.caption_crop, generator)
        return drop_words(tokens, self.config.word_drop, generator) if _is_strong(plan, view) else tokens

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
        if self.model.mean.device.type != "cpu" or self.model.image_size > 96:
            return contextlib.nullcontext()
        return sdpa_kernel(SDPBackend.MATH)

    def _autocast(self) -> torch.autocast:
        device = str(self.model.mean.device.type)
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "amp_bf16")

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser, defence and position; order and augmentation follow from (seed, epoch)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "defense": self.defense.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.defense.load_state_dict(state["defense"])
        self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])


def _is_strong(plan: EpochPlan, view: int) -> bool:
    return plan.strong == "all" or (plan.strong == "further" and view > 0)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with no decay on gains, biases and the temperature, as open_clip groups them."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
