"""Targeted poisoning: who is targeted, as what, and with which captions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from otcclip.attacks import PoisonContext, Targeted
from otcclip.attacks.context import PairIndex
from otcclip.errors import UserError


def corpus(names: int, tests: int = 20) -> PoisonContext:
    def split(hand: str, n: int) -> PairIndex:
        labels = tuple(f"n{i % names}" for i in range(n))
        return PairIndex(tuple(f"{hand}-{i}" for i in range(n)), tuple(f"{x}!" for x in labels), labels)

    return PoisonContext(split("a", 3 * names), split("b", tests))


@pytest.mark.parametrize("seed", range(20))
def test_each_image_gets_a_class_of_its_own_that_is_not_its_own(seed: int) -> None:
    context = corpus(names=17)  # the tightest that is allowed
    plan = Targeted().plan(context, seed)
    own = dict(zip(context.test.keys, context.test.labels, strict=True))
    assert len(set(plan.trial.keys)) == len(set(plan.trial.wanted)) == 16
    assert all(own[k] != w for k, w in zip(plan.trial.keys, plan.trial.wanted, strict=True))
    assert Counter(a.source_key for a in plan.added) == dict.fromkeys(plan.trial.keys, 15)
    wanted = dict(zip(plan.trial.keys, plan.trial.wanted, strict=True))
    assert all(a.caption == wanted[a.source_key] + "!" for a in plan.added)
    assert not plan.replaced and plan.target == ""
    assert [(r.key, r.location) for r in plan.records] == [(a.key, a.source_key) for a in plan.added]


def test_the_class_argued_for_is_one_that_the_model_will_know() -> None:
    def context(rare: int, known: int) -> PoisonContext:
        labels = tuple(f"rare{i}" for i in range(rare)) + tuple(f"known{i}" for i in range(known)) * 4
        train = PairIndex(tuple(f"a-{i}" for i in range(len(labels))), tuple(f"{x}!" for x in labels), labels)
        return PoisonContext(train, PairIndex(tuple(f"b-{i}" for i in range(20)), labels[:20], labels[:20]))

    assert all(name.startswith("known") for name in Targeted().plan(context(15, 20), 0).trial.wanted)
    # Ten known classes would not do for sixteen images: the rare ones are drawn on too.
    assert any(name.startswith("rare") for name in Targeted().plan(context(9, 10), 0).trial.wanted)


def test_too_few_names_or_images_is_one_line() -> None:
    with pytest.raises(UserError, match="16 target images need more than 16 class names in training, found 16"):
        Targeted().plan(corpus(names=16), 0)
    with pytest.raises(UserError, match="16 target images asked for, the test split has 9"):
        Targeted().plan(corpus(names=30, tests=9), 0)
    with pytest.raises(UserError, match="copies must be at least 1"):
        Targeted(copies=0)


def test_the_trigger_is_the_identity() -> None:
    image = torch.rand(3, 8, 8)
    assert torch.equal(Targeted().trigger(image), image)
