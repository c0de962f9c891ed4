"""RoCLIP: when it matches, what it matches, what enters the pool, and whom a matching epoch teaches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from otcclip.data.pairs import PairStore
from otcclip.defenses import RoCLIP
from otcclip.defenses.base import KEEP, REPAIR, EpochContext, EpochPlan, PairBatch, TrainingPairs, training_pairs
from otcclip.defenses.losses import clip_loss
from otcclip.errors import UserError
from otcclip.models import TwoTower, create_two_tower


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return create_two_tower("otcclip-tiny", seed=0).eval()


@pytest.fixture(scope="module")
def pairs(make_store: Callable[..., PairStore], model: TwoTower) -> TrainingPairs:
    """60 pictures of 20 things, 60 captions."""
    return training_pairs(make_store(60, 20, own_caption=True), model)


def ask(defense: RoCLIP, epoch: int, model: TwoTower, pairs: TrainingPairs) -> EpochPlan:
    torch.manual_seed(epoch)
    return defense.begin_epoch(EpochContext(epoch, 6, 0, model, pairs))


def batch_of(pairs: TrainingPairs, rows: list[int]) -> PairBatch:
    index = torch.tensor(rows)
    unique, caption = torch.unique(pairs.caption_of[index], return_inverse=True)
    return PairBatch(index, (pairs.images[index].float() / 255,), pairs.tokens[unique], caption)


def pool_of(defense: RoCLIP) -> dict[str, torch.Tensor]:
    assert defense._pool is not None
    return copy.deepcopy(defense._pool.columns)


@pytest.mark.parametrize("every", [1, 3])
def test_matches_in_every_kth_epoch(every: int, model: TwoTower, pairs: TrainingPairs) -> None:
    defense, batch = RoCLIP(every=every, pool=0.1), batch_of(pairs, [0, 1, 2, 3])
    for epoch in range(6):
        plan = ask(defense, epoch, model, pairs)
        assert plan.strong == "all" and plan.index.tolist() == list(range(60))
        assert torch.equal(plan.caption_of, pairs.caption_of)
        with torch.no_grad():
            step = defense.step(batch, model)
        assert set(step.terms) == {"match" if epoch % every == every - 1 else "clip"}


def test_starts_from_random_captions_of_the_data(model: TwoTower, pairs: TrainingPairs) -> None:
    defense = RoCLIP(pool=0.1)
    ask(defense, 0, model, pairs)
    pool = pool_of(defense)
    assert len(set(pool["id"].tolist())) == 6 and torch.equal(pool["tokens"], pairs.tokens[pool["id"]])
    with torch.no_grad():
        cosine = (model.text(pool["tokens"]).pooled * pool["vector"]).sum(1)
    assert cosine.min() > 0.999  # there in bfloat16, here in float32
    other = RoCLIP(pool=0.1)
    ask(other, 1, model, pairs)
    assert not torch.equal(pool_of(other)["id"], pool["id"])


def test_captions_of_every_batch_enter_and_the_oldest_leave(model: TwoTower, pairs: TrainingPairs) -> None:
    defense = RoCLIP(every=2, pool=0.1)
    ask(defense, 0, model, pairs)
    first = pool_of(defense)["id"].tolist()
    free = [i for i in range(60) if int(pairs.caption_of[i]) not in first]
    rows = [free[:3], free[3:5]]
    ids = [sorted(pairs.caption_of[r].tolist()) for r in rows]
    with torch.no_grad():
        defense.step(batch_of(pairs, rows[0]), model)
        assert pool_of(defense)["id"].tolist() == first[3:] + ids[0]
        ask(defense, 1, model, pairs)  # a matching epoch: its own captions enter as well, after the match
        defense.step(batch_of(pairs, rows[1]), model)
        pool = pool_of(defense)
        assert pool["id"].tolist() == first[5:] + ids[0] + ids[1]
        torch.testing.assert_close(pool["vector"][-2:], model.text(pairs.tokens[ids[1]]).pooled)
    assert set(defense.decisions(pairs).caption_of[rows[1]].tolist()) <= {*first[3:], *ids[0]}


def test_the_match_is_the_nearest_caption_of_the_pool(model: TwoTower, pairs: TrainingPairs) -> None:
    defense, rows = RoCLIP(every=1, pool=0.2), list(range(30))
    ask(defense, 0, model, pairs)
    before = defense.decisions(pairs)
    assert (before.action == KEEP).all()
    pool, batch = pool_of(defense), batch_of(pairs, rows)
    with torch.no_grad():
        step = defense.step(batch, model)
        image = model.image(batch.images[0]).pooled
        nearest = (image @ pool["vector"].T).argmax(1)
        used, caption = torch.unique(nearest, return_inverse=True)
        expected = clip_loss(image, pool["vector"][used], caption, model.logit_scale)
    torch.testing.assert_close(step.loss, expected)
    decided = defense.decisions(pairs)
    assert decided.caption_of[rows].tolist() == pool["id"][nearest].tolist()
    own = pairs.caption_of.numpy()
    assert (decided.action == np.where(decided.caption_of == own, KEEP, REPAIR)).all() and decided.action.any()
    assert (decided.caption_of[30:] == own[30:]).all(), "not visited yet"
    ask(defense, 1, model, pairs)
    assert (defense.decisions(pairs).action == KEEP).all(), "every matching epoch starts over"


@pytest.mark.parametrize("variant", ["detached", "live"])
def test_whom_a_matching_epoch_teaches(variant: str, model: TwoTower, pairs: TrainingPairs) -> None:
    """Detached: the image tower and the temperature alone. Live: the text tower too, from the pool's own tokens."""
    defense = RoCLIP(every=1, pool=0.2, variant=variant)  # type: ignore[arg-type]
    learner = copy.deepcopy(model)
    ask(defense, 0, learner, pairs)
    # In evaluation mode a new model gives every image the same caption, and there is nothing to tell apart.
    step = defense.step(batch_of(pairs, list(range(12))), learner.train())
    assert len(set(defense.decisions(pairs).caption_of[:12].tolist())) > 1
    step.loss.backward()
    learns = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    text = {name for name in learns if name.startswith(("clip.transformer", "clip.token_embedding", "clip.ln_final"))}
    assert bool(text) is (variant == "live")
    assert "clip.logit_scale" in learns and any(name.startswith("clip.visual") for name in learns)


def test_both_variants_see_the_same_loss_while_the_model_stands_still(model: TwoTower, pairs: TrainingPairs) -> None:
    losses = []
    for variant in ("detached", "live"):
        defense = RoCLIP(every=1, pool=0.2, variant=variant)  # type: ignore[arg-type]
        with torch.no_grad():
            ask(defense, 0, model, pairs)
            for rows in (range(12), range(12, 24)):  # twice: by then the pool was encoded in float32 throughout
                step = defense.step(batch_of(pairs, list(rows)), model)
        losses.append(step.loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"pool": 0.0}, {"pool": 1.5}, {"variant": "alive"}])
def test_options_that_make_no_sense_are_one_line(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"roclip: .*every is 1 or more"):
        RoCLIP(**wrong)  # type: ignore[arg-type]
