"""What a run will take, before it is started: steps, memory, hours on H100s. Measured on two pairs, then multiplied.

The model of cost, each number in one place:

* floating-point operations: counted by torch over a forward pass of two pairs here; a backward pass counts twice that;
* time: those at UTILISATION of an H100's dense bf16 peak, an assumption (ResNets reach less, large ViTs more). Of what
  a defence adds only further views are counted, not transport and matching;
* memory of a process: 16 bytes a parameter (float32 weights and gradients, AdamW's two moments) and what autograd keeps
  for a pair, counted here in float32 and halved under amp, times the pairs encoded at once;
* money: USD_PER_HOUR, an assumption; put your own there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from otcclip.models import TwoTower, create_two_tower
from otcclip.training.train_spec import TrainSpec

H100_PEAK = 989e12  # dense bf16, SXM
UTILISATION = 0.30
USD_PER_HOUR = 2.5
VIEWS = {"otcclip-paper": 2, "safeclip": 2, "cleanclip": 2}  # image encodings a pair and step, where not one
CAPTION = "a photo of a small brown dog that runs over wet grass"  # twelve words, about CC3M's mean


@dataclass(frozen=True)
class Cost:
    """A run's estimate; see the module's docstring for each rule.

    Attributes:
        steps: optimiser steps. pairs_seen: visits of pairs.
        tflop: 1e12 operations in all.
        parameters: of both towers. memory_gib: of one process. decoded_gib: the corpus decoded.
        gpu_hours, usd: on H100s.
    """

    pairs: int
    steps: int
    pairs_seen: int
    tflop: float
    parameters: int
    memory_gib: float
    decoded_gib: float
    gpu_hours: float
    usd: float

    def lines(self) -> list[str]:
        return [
            f"pairs        {self.pairs:,}",
            f"steps        {self.steps:,} ({self.pairs_seen:,} visits)",
            f"parameters   {self.parameters / 1e6:.1f} M",
            f"memory       {self.memory_gib:.1f} GiB a process",
            f"decoded      {self.decoded_gib:,.1f} GiB of disk, or decoded on demand",
            f"compute      {self.tflop:,.0f} TFLOP",
            f"one H100     {self.gpu_hours:,.1f} h at {UTILISATION:.0%} of {H100_PEAK / 1e12:.0f} TFLOP/s, "
            f"{self.usd:,.0f} USD at {USD_PER_HOUR} an hour",
        ]


def estimate(spec: TrainSpec, pairs: int, processes: int = 1) -> Cost:
    """The cost of `spec` on `pairs` pairs over `processes` processes."""
    model = create_two_tower(spec.model, seed=0)
    views = VIEWS.get(spec.defense.partition(":")[0], 1)
    flops, kept = _measure(model, views)
    batch = min(spec.global_batch(processes), pairs)
    steps = spec.epochs * (pairs // batch)
    seen = steps * batch
    parameters = sum(p.numel() for p in model.parameters())
    keeps = kept / (2 if spec.precision != "fp32" else 1)
    memory = 16 * parameters + keeps * spec.batch_size
    tflop = 3 * flops * seen * (4 / 3 if spec.accum_freq > 1 else 1) / 1e12
    hours = tflop * 1e12 / (H100_PEAK * UTILISATION) / 3600
    decoded = pairs * 3 * model.image_size**2 / 2**30
    return Cost(pairs, steps, seen, tflop, parameters, memory / 2**30, decoded, hours, hours * USD_PER_HOUR)


def _measure(model: TwoTower, views: int) -> tuple[float, float]:
    """Operations of a forward pass and bytes that autograd keeps, each a pair, in float32."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(2, 3, model.image_size, model.image_size)
    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [model.image(images).pooled for _ in range(views)]
        outputs.append(model.text(model.tokenize([CAPTION] * 2)).pooled)
    return counter.get_total_flops() / 2, sum(kept.values()) / 2
