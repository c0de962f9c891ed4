"""A batch over two processes, or in chunks, trains as the same batch in one. Two real gloo processes, one launch."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import socket
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from otcclip import defenses
from otcclip.defenses.base import PairBatch, training_pairs
from otcclip.defenses.losses import clip_loss
from otcclip.models import create_two_tower
from otcclip.training.distributed import (
    ALONE,
    GlobalBatchNorm2d,
    World,
    average_gradients,
    join,
    leave,
    synchronise_batch_norm,
)
from otcclip.training.towers import Share, SpreadTower

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_processes.py"
PAIRS, STEPS = 24, 4  # the second epoch begins
PATIENCE = 400  # seconds that two ranks may take


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = benchmark()
BENCHMARK.PAIRS = PAIRS  # type: ignore[attr-defined]  # in the ranks too: they are forks


def norm_case() -> tuple[nn.BatchNorm2d, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(5, generator=generator))
        norm.bias.copy_(torch.randn(5, generator=generator))
    x = torch.randn(7, 5, 3, 4, generator=generator) * 3 + 100  # a mean that the one-pass formula would drown in
    return norm, x, torch.randn(x.shape, generator=generator)


def features_case(world: World, chunks: int) -> dict[str, Any]:
    """Gradients of one step of `otcclip` and of some rows picked out; evaluation mode, so no batch statistics."""
    model = create_two_tower("otcclip-tiny", seed=0).eval()
    pairs = training_pairs(BENCHMARK.pictures(9), model)
    index = torch.arange(9)
    unique, caption = torch.unique(pairs.caption_of, return_inverse=True)
    images = pairs.images.float() / 255
    spread = world.size > 1 or chunks > 1
    batch = PairBatch(
        index,
        (Share.of(images[world.share(9)], 9, world) if spread else images,),  # type: ignore[arg-type]
        pairs.tokens[unique],
        caption,
    )
    tower = SpreadTower(model, world, chunks) if spread else model
    defense = defenses.make("otcclip")
    picked = torch.tensor([8, 0, 3, 4, 7])
    step = defense.step(batch, tower)  # type: ignore[arg-type]
    part = tower.image(batch.images[0][picked])  # type: ignore[operator]
    (step.loss + (part.pooled[:, 0] * torch.arange(5)).sum() + part.local.values[3, 1]).backward()
    if spread:
        tower.replay()  # type: ignore[operator]
    if world.size > 1:
        average_gradients(list(model.parameters()), world)
    return {name: p.grad for name, p in model.named_parameters()}


def few_rows_case(world: World) -> torch.Tensor:
    """Gradient of the first weights where one rank has fewer rows than there are chunks; batch norms meet."""
    model = create_two_tower("otcclip-tiny", seed=0).train()
    synchronise_batch_norm(model, world)
    images = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tower = SpreadTower(model, world, 2)
    part = tower.image(Share.of(images[world.share(9)], 9, world)[torch.tensor([0, 5, 6, 7, 8])])
    (part.pooled[:, 0] * torch.arange(5)).sum().backward()
    tower.replay()
    grad = next(model.clip.visual.parameters()).grad
    assert grad is not None
    return grad


def one_step(world: World, sharded: bool) -> dict[str, torch.Tensor]:
    """Weights after a step of plain descent; FSDP2 over the transformers' blocks, as docs/scale.md has it."""
    model = create_two_tower(BENCHMARK.register_vit(), seed=0)
    if sharded:
        mesh = init_device_mesh("cpu", (world.size,))
        for block in (*model.clip.visual.transformer.resblocks, *model.clip.transformer.resblocks):
            fully_shard(block, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    text = model.text(model.tokenize([f"thing {letter}" for letter in "abcdef"]))
    clip_loss(model.image(images).pooled, text.pooled, torch.arange(6), model.logit_scale).backward()
    optimizer.step()
    named = dict(model.named_parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named.items()}


def as_a_rank(rank: int, port: int, out: str) -> None:
    """What each of the two processes does."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    world = join("cpu")
    found: dict[str, Any] = {"losses": {}, "grads": {}}
    for name in defenses.DEFENSES:
        found["losses"][name] = BENCHMARK.losses(name, STEPS, world)
    for chunks in (1, 2):
        found["grads"][chunks] = features_case(world, chunks)
    found["few"] = few_rows_case(world)
    norm, x, wanted = norm_case()
    norm.__class__ = GlobalBatchNorm2d
    mine = x[world.share(7)].requires_grad_()
    y = norm(mine)
    (y * wanted[world.share(7)]).sum().backward()
    found["norm"] = [y.detach(), mine.grad, norm.weight.grad, norm.running_mean, norm.running_var]
    found["sharded"], found["whole"] = one_step(world, sharded=True), one_step(world, sharded=False)
    found["agreed"] = world.agreed(f"rank {world.rank}")
    torch.save(found, f"{out}.{world.rank}")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks") / "found"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # spares the children the imports
    processes = [context.Process(target=as_a_rank, args=(rank, port, str(out)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
            pytest.fail("a rank failed, see its traceback above; or the ranks waited for each other")
        time.sleep(0.05)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(f"{out}.{r}", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("name", defenses.DEFENSES)
def test_two_processes_train_as_one(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = BENCHMARK.losses(name, STEPS, ALONE)
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    assert ranks[0]["losses"][name] == ranks[1]["losses"][name], "ranks that part ways never meet again"
    assert ranks[0]["losses"][name] == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize(("processes", "chunks"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_gradients_of_a_spread_batch(processes: int, chunks: int, ranks: list[dict[str, Any]]) -> None:
    """The contrastive batch stays whole: gradients are those of one process that encodes it at once."""
    whole = features_case(ALONE, 1)
    spread = features_case(ALONE, chunks) if processes == 1 else ranks[0]["grads"][chunks]
    assert whole.keys() == spread.keys()
    for name, grad in whole.items():
        if grad is None:
            assert spread[name] is None, name
        else:
            torch.testing.assert_close(spread[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rank_with_fewer_rows_than_chunks_keeps_step(ranks: list[dict[str, Any]]) -> None:
    """It meets the others in every pass of the batch norms, and both come out with a gradient."""
    assert all(rank["few"].isfinite().all() and rank["few"].abs().max() > 0 for rank in ranks)


def test_batch_norm_sees_both(ranks: list[dict[str, Any]]) -> None:
    norm, x, wanted = norm_case()
    x.requires_grad_()
    y = norm(x)
    (y * wanted).sum().backward()
    got = [torch.cat([rank["norm"][i] for rank in ranks]) for i in range(2)]
    for mine, theirs in zip(got, (y.detach(), x.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ranks[0]["norm"][2] + ranks[1]["norm"][2], norm.weight.grad, rtol=1e-4, atol=1e-4)
    for rank in ranks:
        torch.testing.assert_close(rank["norm"][3:], [norm.running_mean, norm.running_var], rtol=1e-5, atol=1e-5)


def test_fsdp2_takes_the_same_step(ranks: list[dict[str, Any]]) -> None:
    start = ranks[0]["whole"]["clip.logit_scale"]
    for rank in ranks:
        for name, value in rank["whole"].items():
            torch.testing.assert_close(rank["sharded"][name], value, rtol=0, atol=1e-6, msg=name)
    assert start != pytest.approx(2.6592601, abs=1e-6), "a step was taken"


def test_rank_0_has_the_last_word(ranks: list[dict[str, Any]]) -> None:
    assert [rank["agreed"] for rank in ranks] == ["rank 0", "rank 0"]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8])
def test_shares_are_a_partition(n: int) -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    assert [i for world in worlds for i in range(n)[world.share(n)]] == list(range(n))
    assert worlds[0].counts(n) == [len(range(n)[world.share(n)]) for world in worlds]


def test_rows_of_a_share_are_those_of_the_batch() -> None:
    x, generator = torch.arange(10.0)[:, None], torch.Generator().manual_seed(0)
    shares = [Share.of(x[World(r, 3).share(10)], 10, World(r, 3)) for r in range(3)]
    order = torch.randperm(10, generator=generator)[:7]
    mask = torch.rand(7, generator=generator) < 0.5
    for index in (lambda s: s[order], lambda s: s[order][mask], lambda s: s[torch.arange(10) % 2 == 0]):
        parts, expected = [index(share) for share in shares], index(x)
        assert {len(part) for part in parts} == {len(expected)}
        rebuilt = torch.cat([part.local for part in parts])[torch.argsort(torch.argsort(parts[0].owner, stable=True))]
        assert torch.equal(rebuilt, expected)


def test_running_statistics_count_a_chunked_batch_once() -> None:
    model = create_two_tower("otcclip-tiny", seed=0).train()
    other = copy.deepcopy(model)
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tower = SpreadTower(model, ALONE, chunks=2)
    tower.image(images).pooled.sum().backward()
    tower.replay()
    for chunk in images.tensor_split(2):
        other.image(chunk)
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(mine, theirs, msg=name)
