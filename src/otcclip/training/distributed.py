"""Many processes, one batch: the world a rank lives in, and the four things ranks tell each other.

Every rank draws the same order, decodes and encodes its share of each batch, and gathers the features of the whole
batch with gradient; every rank then computes the same loss over all negatives (`towers.py`). Gradients are averaged
once a step by `average_gradients`. DistributedDataParallel is not used: a step calls the towers several times, in
chunks where gradients are cached, and its hooks want one forward and one backward pass. What is lost is the overlap of
that one reduction with the backward pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from otcclip.errors import UserError

BUCKET = 1 << 24  # elements reduced at once: 64 MB of float32


@dataclass(frozen=True)
class World:
    """One process among `size`; `rank` counts from 0. `ALONE` is a run of one process."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This rank's part of `n` rows, contiguous, sizes differing by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def counts(self, n: int) -> list[int]:
        """How many of `n` rows each rank has."""
        ends = [n * rank // self.size for rank in range(self.size + 1)]
        return [stop - start for start, stop in pairwise(ends)]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agreed(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


ALONE = World()


def join(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """The world that `torchrun` has set up in the environment, or `ALONE` on `device`; nccl on GPUs, else gloo.

    Raises:
        UserError: a GPU is asked for and there is none for this rank.
    """
    local, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device {device!r}: auto, cpu or cuda")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"--device cuda: rank {local} of this machine has no GPU ({torch.cuda.device_count()} found)"
            )
        torch.cuda.set_device(local)
        chosen = torch.device("cuda", local)
    else:
        chosen = torch.device("cpu")
    if size == 1:
        return World(device=chosen)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def leave() -> None:
    """Undo `join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Rows of all ranks, one rank after another; backward, a rank's rows get what all ranks' losses ask of them."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, counts: list[int]) -> Tensor:
        ctx.counts, ctx.rank = counts, dist.get_rank()
        padded = mine.new_zeros((max(counts), *mine.shape[1:]))
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.counts[: ctx.rank])
        return total[start : start + ctx.counts[ctx.rank]], None


def gather(mine: Tensor, counts: list[int]) -> Tensor:
    """`[sum(counts), ...]` from every rank's `[counts[rank], ...]`, with gradient.

    The gradient of a row is the sum over ranks of what each rank's loss asks of it, so that averaging parameter
    gradients over ranks gives the gradient of the mean of the ranks' losses: of *the* loss, where all compute the same.
    """
    out: Tensor = _Gather.apply(mine.contiguous(), counts)
    return out


def gather_counts(count: int, world: World) -> list[int]:
    """Every rank's `count`."""
    counts = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    counts[world.rank] = count
    dist.all_reduce(counts)
    return [int(c) for c in counts]


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Replace each gradient by its mean over ranks; one that no rank has stays absent."""
    if world.size == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=world.device)
    dist.all_reduce(present)
    used = [p for p, here in zip(parameters, present.tolist(), strict=True) if here]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket: list[Tensor] = []
    for p in used:
        assert p.grad is not None
        bucket.append(p.grad)
        if sum(g.numel() for g in bucket) >= BUCKET:
            _mean(bucket, world)
            bucket = []
    _mean(bucket, world)


def _mean(grads: list[Tensor], world: World) -> None:
    for dtype in dict.fromkeys(g.dtype for g in grads):
        same = [g for g in grads if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat)
        flat /= world.size
        for grad, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
            grad.copy_(part.view_as(grad))


class _Sum(torch.autograd.Function):
    """Sum over ranks; its adjoint is the same sum."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all ranks, for CPUs; torch's SyncBatchNorm knows GPUs alone.

    Two sums, mean first: the one-pass formula E[x^2] - E[x]^2 loses the digits that one process would keep.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = x - mean[:, None, None]
        variance = _Sum.apply((centred * centred).sum((0, 2, 3))) / total
        self._remember(mean.detach(), variance.detach() * total / (total - 1))
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        scaled: Tensor = out * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased, momentum)
        self.num_batches_tracked += 1


def synchronise_batch_norm(model: nn.Module, world: World) -> None:
    """Make the model's batch normalisation see all ranks' rows; weights, buffers and their names stay."""
    if world.size == 1:
        return
    if world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
