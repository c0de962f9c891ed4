"""Planting: what is refused, what can't be told, and how pixels are rounded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.attacks import (
    BadNets,
    PoisonContext,
    PoisonPlan,
    Targeted,
    Trial,
    apply_trigger,
    make_plans,
    poison,
)
from otcclip.attacks.context import PairIndex
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError


def pairs(hand: str, n: int, size: int = 16, names: int = 20) -> PairStore:
    labels = tuple(f"n{i % names}" for i in range(n))
    images = np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return PairStore(tuple(f"{hand}-{i:04x}" for i in range(n)), images, labels, labels, (hand,) * n)


TRAIN, TEST = pairs("noto", 200), pairs("tw", 30)


@dataclass(frozen=True)
class Dim:
    """Takes seven tenths of the light: a trigger whose result falls between two byte values."""

    name: str = "dim"
    has_trigger: ClassVar[bool] = True

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        raise NotImplementedError

    def trigger(self, images: torch.Tensor) -> torch.Tensor:
        return images * 0.3


@dataclass(frozen=True)
class Broken:
    """Returns what it is given: a plan that breaks the contract."""

    given: PoisonPlan
    name: str = "targeted"
    has_trigger: ClassVar[bool] = False

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        return self.given

    def trigger(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_trigger_is_rounded_to_the_nearest_byte() -> None:
    given = np.arange(300 * 4 * 4 * 3, dtype=np.int64).reshape(300, 4, 4, 3).astype(np.uint8)
    shown = apply_trigger(Dim(), given, batch=7)
    exact = given.astype(np.float64) * 0.3
    assert shown.dtype == np.uint8
    assert np.abs(shown - exact).max() <= 0.5
    assert np.array_equal(shown, apply_trigger(Dim(), given, batch=300))


def test_apply_trigger_leaves_its_input() -> None:
    given = TRAIN.images[:3].copy()
    shown = apply_trigger(Targeted(), given)
    assert np.array_equal(shown, given) and not np.shares_memory(shown, given)
    apply_trigger(BadNets("n1"), given)
    assert np.array_equal(given, TRAIN.images[:3])


def test_poison_can_not_be_told_by_place_or_key() -> None:
    done = poison(TRAIN, TEST, [BadNets("n1", count=40), Targeted()], 0)
    planted = {record.key for record in done.records}
    places = np.array([i for i, key in enumerate(done.store.keys) if key in planted]) / len(done.store)
    # 280 of 440 at random places: the mean place of the planted is near the middle (4 standard errors).
    assert abs(places.mean() - 0.5) < 4 * 0.29 / np.sqrt(len(planted)) and places.min() < 0.02
    assert all(re.fullmatch(r"noto-[0-9a-f]{4}", key) for key in done.store.keys)
    assert poison(TRAIN, TEST, [Targeted()], 1).store.keys != poison(TRAIN, TEST, [Targeted()], 2).store.keys


def test_an_attack_plans_the_same_whatever_follows_it() -> None:
    alone = make_plans(TRAIN, TEST, [BadNets("n1")], 0)
    assert make_plans(TRAIN, TEST, [BadNets("n1"), Targeted()], 0)[:1] == alone


def test_attacks_of_other_names_draw_other_pairs() -> None:
    (one,), (other,) = (make_plans(TRAIN, TEST, [BadNets("n1", name=name)], 0) for name in ("a", "b"))
    assert {r.key for r in one.replaced} != {r.key for r in other.replaced}


def test_the_second_backdoor_takes_other_pairs_and_no_planted_caption() -> None:
    first, second = make_plans(TRAIN, TEST, [BadNets("n1"), BadNets("n2", name="again")], 0)
    assert not first.keys & second.keys
    taken = {r.key for r in first.replaced}
    left = [c for k, c in zip(TRAIN.keys, TRAIN.captions, strict=True) if c == "n2" and k not in taken]
    assert left and {r.caption for r in second.replaced} == {"n2"}


def test_no_attack_is_a_shuffle() -> None:
    done = poison(TRAIN, TEST, [], 0)
    assert not done.records and done.store.keys != TRAIN.keys
    back = done.store.take(np.argsort(np.array(done.store.keys)))
    assert np.array_equal(back.images, TRAIN.images) and back.captions == TRAIN.captions
    assert back.labels == TRAIN.labels and back.sources == TRAIN.sources


def test_sources_are_kept_only_where_both_have_them() -> None:
    assert poison(replace(TRAIN, sources=()), TEST, [Targeted()], 0).store.sources == ()
    assert poison(TRAIN, replace(TEST, sources=()), [Targeted()], 0).store.sources == ()


def test_user_errors() -> None:
    with pytest.raises(UserError, match="'badnets' is named 2 times"):
        poison(TRAIN, TEST, [BadNets("n1", count=2), BadNets("n2", count=2)], 0)
    with pytest.raises(UserError, match=r"training images are \(16, 16, 3\), test images \(8, 8, 3\)"):
        poison(TRAIN, pairs("tw", 30, size=8), [Targeted()], 0)
    with pytest.raises(UserError, match="found 200 pairs, 200 captions, 0 class names"):
        poison(replace(TRAIN, labels=()), TEST, [Targeted()], 0)


def test_a_plan_that_breaks_its_contract_is_refused() -> None:
    (good,) = make_plans(TRAIN, TEST, [Targeted()], 0)
    (backdoor,) = make_plans(TRAIN, TEST, [BadNets("n1", name="targeted")], 0)
    stolen = replace(good.added[0], key=TRAIN.keys[0])
    lost = replace(good.added[0], source_key="nobody")
    strayed = replace(backdoor.replaced[0], key="nobody")
    broken = [
        (replace(good, records=good.records[1:]), "records and planned pairs differ"),
        (replace(good, added=good.added + good.added[:1], records=good.records * 2), "records and planned"),
        (replace(good, records=(replace(good.records[0], attack="x"), *good.records[1:])), "another attack"),
        (
            replace(good, added=(stolen,), records=(replace(good.records[0], key=stolen.key),)),
            "under keys in use",
        ),
        (replace(good, added=(lost,), records=good.records[:1]), "do not exist"),
        (replace(good, trial=Trial(("nobody",), ("n1",))), "do not exist"),
        (
            replace(backdoor, replaced=(strayed,), records=(replace(backdoor.records[0], key="nobody"),)),
            "not free",
        ),
    ]
    for plan, message in broken:
        with pytest.raises(ValueError, match=message):
            make_plans(TRAIN, TEST, [Broken(plan)], 0)


def test_a_pair_can_not_be_planted_on_twice() -> None:
    (plan,) = make_plans(TRAIN, TEST, [BadNets("n1", count=3)], 0)
    again = replace(plan, attack="again", records=tuple(replace(r, attack="again") for r in plan.records))
    with pytest.raises(ValueError, match="not free"):
        make_plans(TRAIN, TEST, [BadNets("n1", count=3), Broken(again, name="again")], 0)


def test_a_trial_wants_a_name_for_each_key() -> None:
    with pytest.raises(ValueError, match="1 keys but 2 wanted"):
        Trial(("a",), ("x", "y"))


@settings(max_examples=40, deadline=None)
@given(
    keys=st.sets(st.text("ab01-/", min_size=1, max_size=6), min_size=1, max_size=20),
    count=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_fresh_keys_are_new_and_unlike_each_other(keys: set[str], count: int, seed: int) -> None:
    index = PairIndex(tuple(sorted(keys)), ("",) * len(keys), ("",) * len(keys))
    context = PoisonContext(index, PairIndex(("test",), ("",), ("",)), frozenset({"a-0"}))
    fresh = context.fresh_keys(count, np.random.default_rng(seed))
    assert len(set(fresh)) == count
    assert not set(fresh) & {*keys, "test", "a-0"}


def test_fresh_keys_join_the_halves_of_honest_ones() -> None:
    index = PairIndex(("noto-1f43b", "twemoji-1f34c"), ("", ""), ("", ""))
    fresh = PoisonContext(index, PairIndex((), (), ())).fresh_keys(2, np.random.default_rng(0))
    assert set(fresh) == {"noto-1f34c", "twemoji-1f43b"}
    taken = PairIndex(("noto-1f34c",), ("",), ("",))
    for seed in range(10):
        assert PoisonContext(index, taken).fresh_keys(1, np.random.default_rng(seed)) == ["twemoji-1f43b"]


def test_index_without_drops_pixels_too() -> None:
    index = PairIndex.of(TRAIN)
    rest = index.without({TRAIN.keys[0], TRAIN.keys[7]})
    assert rest.keys == tuple(k for k in TRAIN.keys if k not in (TRAIN.keys[0], TRAIN.keys[7]))
    assert rest.images is not None and np.array_equal(rest.images[0], TRAIN.images[1])
    assert len(rest.labels) == len(rest.captions) == len(rest.images) == 198
