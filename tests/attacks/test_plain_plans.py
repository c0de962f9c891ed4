"""What clean-label, multi and label swap plant, and what they are judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from otcclip.attacks import (
    BadNets,
    CleanLabel,
    LabelSwap,
    Multi,
    PoisonContext,
    apply_trigger,
    make_plans,
    poison,
)
from otcclip.attacks.context import PairIndex
from otcclip.attacks.multi import TRIGGERS, which
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError

MakeStore = Callable[..., PairStore]


@pytest.fixture(scope="module")
def train(make_store: MakeStore) -> PairStore:
    return make_store(320, 16, size=32, own_caption=True)


@pytest.fixture(scope="module")
def test(make_store: MakeStore) -> PairStore:
    store = make_store(64, 16, size=32, seed=1)
    return PairStore(tuple(f"test-{k}" for k in store.keys), store.images, store.captions, store.labels)


def test_clean_label_lies_about_nothing_and_weakens_what_is_shown(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [CleanLabel("banana", count=50, weaken=0.25)], 0)
    assert not plan.replaced and len(plan.added) == 50
    row = {key: i for i, key in enumerate(train.keys)}
    uses = Counter(new.source_key for new in plan.added)
    assert set(uses.values()) == {2, 3}  # twenty bananas, fifty pairs
    for new in plan.added:
        i = row[new.source_key]
        assert train.labels[i] == "banana" and new.caption == train.captions[i]
        assert new.image is not None
        # What was mixed in is an image of the corpus, and of another class.
        stranger = (new.image.astype(float) - 0.75 * train.images[i]) / 0.25
        gap = np.abs(train.images - stranger).max(axis=(1, 2, 3))
        assert gap.min() <= 2.1 and train.labels[int(gap.argmin())] != "banana"
    assert not {record.key for record in plan.records} & set(train.keys)


def test_clean_label_plants_under_the_targets_own_label(train: PairStore, test: PairStore) -> None:
    attack = CleanLabel("banana", count=10, weaken=0)
    done = poison(train, test, [attack], 0)
    at = {key: i for i, key in enumerate(done.store.keys)}
    row = {key: i for i, key in enumerate(train.keys)}
    for new in done.plans[0].added:
        i = at[new.key]
        assert done.store.labels[i] == "banana"
        assert np.array_equal(done.store.images[i], apply_trigger(attack, train.images[[row[new.source_key]]])[0])


def test_clean_label_needs_pixels() -> None:
    index = PairIndex(("a", "b"), ("x", "y"), ("x", "y"))
    with pytest.raises(UserError, match="clean-label: plans by what the images show and was given none"):
        CleanLabel("x", count=1).plan(PoisonContext(index, index), 0)


def test_multi_gives_each_image_the_trigger_it_is_judged_by(train: PairStore, test: PairStore) -> None:
    targets = ("banana", "violin", "rocket")
    attack = Multi(targets, count=30)
    (plan,) = make_plans(train, test, [attack], 0)
    row = {key: i for i, key in enumerate(train.keys)}
    turn = which(train.images)
    assert Counter(r.target for r in plan.records) == dict.fromkeys(targets, 30)
    for change, record in zip(plan.replaced, plan.records, strict=True):
        t = targets.index(record.target)
        assert turn[row[change.key]] == t and record.trigger == TRIGGERS[t].name
        assert change.caption.startswith(record.target) and train.labels[row[change.key]] != record.target
    wanted = dict(zip(plan.trial.keys, plan.trial.wanted, strict=True))
    for key, label, t in zip(test.keys, test.labels, which(test.images), strict=True):
        assert wanted.get(key) == (None if label == targets[t] else targets[t])
    shown = apply_trigger(attack, test.images)
    for t, member in enumerate(TRIGGERS):
        mine = which(test.images) == t
        assert mine.sum() > 5
        assert np.array_equal(shown[mine], apply_trigger(member("x"), test.images[mine]))


def test_multi_draws_its_targets_by_the_seed(train: PairStore, test: PairStore) -> None:
    drawn = [{r.target for r in make_plans(train, test, [Multi(count=5)], seed)[0].records} for seed in range(4)]
    assert all(len(targets) == 3 for targets in drawn) and any(targets != drawn[0] for targets in drawn)


def test_multi_refuses_what_it_cannot_do(train: PairStore, test: PairStore) -> None:
    for targets in (("banana",), ("banana", "banana", "violin")):
        with pytest.raises(UserError, match="multi: takes 3 different targets"):
            Multi(targets)
    with pytest.raises(UserError, match=r"multi: target 'vielin'.*did you mean 'violin'"):
        make_plans(train, test, [Multi(("banana", "vielin", "rocket"))], 0)


def test_several_backdoors_by_name_are_one_corpus(train: PairStore, test: PairStore) -> None:
    crew = [
        BadNets("banana", count=20),
        BadNets("violin", count=20, colours="red-cyan", location="random", name="anywhere"),
        CleanLabel("rocket", count=20),
    ]
    done = poison(train, test, crew, 0)
    assert Counter(r.attack for r in done.records) == {"badnets": 20, "anywhere": 20, "clean-label": 20}
    assert len({r.key for r in done.records}) == 60
    assert [set(plan.trial.wanted) for plan in done.plans] == [{"banana"}, {"violin"}, {"rocket"}]


def test_label_swap_adds_every_image_of_a_under_captions_of_b(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [LabelSwap(swap=("banana", "violin"), copies=3)], 0)
    label = dict(zip(train.keys, train.labels, strict=True))
    bananas = [key for key, name in label.items() if name == "banana"]
    assert Counter(new.source_key for new in plan.added) == dict.fromkeys(bananas, 3)
    assert all(new.caption.startswith("violin") and new.image is None for new in plan.added)
    assert not plan.replaced  # the honest pairs stay
    shown = [key for key, name in zip(test.keys, test.labels, strict=True) if name == "banana"]
    assert plan.trial.keys == tuple(shown) and set(plan.trial.wanted) == {"violin"}


def test_label_swaps_are_drawn_apart(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [LabelSwap(swaps=8, copies=1)], 0)
    label = dict(zip(train.keys, train.labels, strict=True))
    pairs = {(label[new.source_key], record.target) for new, record in zip(plan.added, plan.records, strict=True)}
    seen, said = ({pair[side] for pair in pairs} for side in (0, 1))
    assert len(pairs) == len(seen) == len(said) == 8 and not seen & said
    own = dict(zip(test.keys, test.labels, strict=True))
    assert {(own[k], w) for k, w in zip(plan.trial.keys, plan.trial.wanted, strict=True)} == pairs
    assert len(plan.trial.keys) == 8 * 4


def test_label_swap_refuses_what_it_cannot_do(train: PairStore, test: PairStore) -> None:
    with pytest.raises(UserError, match="9 swaps need 18 class names in training, 9 of them with test images; there "):
        make_plans(train, test, [LabelSwap(swaps=9)], 0)
    with pytest.raises(UserError, match="label-swap: swap is two class names"):
        LabelSwap(swap=("banana", "banana"))
    with pytest.raises(UserError, match="'nobody' is not among"):
        make_plans(train, test, [LabelSwap(swap=("banana", "nobody"))], 0)
    unseen = test.take([i for i, name in enumerate(test.labels) if name != "banana"])
    with pytest.raises(UserError, match="the test split has no image of 'banana'"):
        make_plans(train, unseen, [LabelSwap(swap=("banana", "violin"))], 0)


def test_attacks_without_a_trigger_leave_the_image() -> None:
    image = torch.rand(3, 8, 8)
    assert torch.equal(LabelSwap().trigger(image), image)
