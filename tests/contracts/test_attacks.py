"""The contract of every attack: those in the registry and a toy defined here pass the same tests."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from otcclip import registry
from otcclip.attacks import (
    ATTACKS,
    Addition,
    Attack,
    PoisonContext,
    PoisonPlan,
    PoisonRecord,
    Replacement,
    apply_trigger,
    make_plans,
    poison,
    read_records,
    write_records,
)
from otcclip.attacks.base import rng_for
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.models import Features
from otcclip.transport import FeatureSets

TARGET = "polar bear"
NAMES = (TARGET, "banana", "red apple", "ice cream", *(f"animal {i}" for i in range(16)))


@dataclass(frozen=True)
class Toy:
    """One pixel inverted, one pair replaced, one jittered copy added: a newcomer's one file."""

    target: str
    name: str = "toy"

    has_trigger: ClassVar[bool] = True

    def plan(self, corpus: PoisonContext, seed: int) -> PoisonPlan:
        corpus.require_name(self.name, self.target)
        rng = rng_for(self.name, seed)
        victim = next(i for i, label in enumerate(corpus.train.labels) if label != self.target)
        (caption,) = corpus.captions_of(self.target, 1, rng)
        (key,) = corpus.fresh_keys(1, rng)
        assert corpus.test.images is not None
        jittered = np.roll(corpus.test.images[0], 1, axis=0)

        def record(key: str, caption: str) -> PoisonRecord:
            return PoisonRecord(key, self.name, "inverted pixel", "top-left", self.target, seed, caption)

        return PoisonPlan(
            self.name,
            self.target,
            (Replacement(corpus.train.keys[victim], caption),),
            (Addition(key, corpus.test.keys[0], caption, jittered),),
            (
                record(corpus.train.keys[victim], corpus.train.captions[victim]),
                record(key, corpus.test.captions[0]),
            ),
            corpus.backdoor_trial(self.name, self.target),
        )

    def trigger(self, images: torch.Tensor) -> torch.Tensor:
        out = images.clone()
        out[..., 0, 0] = 1 - out[..., 0, 0]
        return out


class Glance:
    """A surrogate without a network: an image is its mean colour by quarter, a caption what its letters add up to."""

    image_size = 48

    def see(self, images: torch.Tensor) -> Features:
        return self._features(F.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2))

    def read(self, captions: Sequence[str]) -> Features:
        sums = torch.tensor([[[sum(map(ord, c)) % p for p in (7, 11, 13)]] for c in captions])
        return self._features(sums.float() + 1)

    def _features(self, sets: torch.Tensor) -> Features:
        unit = F.normalize(sets, dim=-1)
        return Features(F.normalize(unit.mean(1), dim=-1), FeatureSets.from_dense(unit))


FAMILY = registry.registry("attack", (*ATTACKS.values(), Toy))
# What the small corpus below needs; a newcomer that its defaults suit needs no line here.
OPTIONS: dict[str, dict[str, Any]] = {
    "multi": {"count": 30},
    "label-swap": {"swaps": 4},
    "jittered": {"images": 4, "copies": 5},
    "mimicry": {"count": 20},
    "low-ot": {"count": 20, "choice": 3, "templates": 10},
}


def pairs(hand: str, n: int, seed: int, size: int = 48) -> PairStore:
    rng = np.random.default_rng(seed)
    labels = tuple(NAMES[i % len(NAMES)] for i in range(n))
    return PairStore(
        keys=tuple(f"{hand}-{i:05x}" for i in range(n)),
        images=rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
        captions=tuple(f"{label} | {hand} {i}" for i, label in enumerate(labels)),
        labels=labels,
        sources=(hand,) * n,
    )


@pytest.fixture(scope="module")
def train() -> PairStore:
    return pairs("noto", 300, seed=1)


@pytest.fixture(scope="module")
def held_out() -> PairStore:
    return pairs("twemoji", 40, seed=2)


@pytest.fixture(params=FAMILY)
def attack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Attack:
    takes = inspect.signature(FAMILY[request.param]).parameters
    options = {"target": TARGET} if "target" in takes else {}
    if "patch" in takes:
        options["patch"] = str(tmp_path_factory.mktemp("patch") / "patch.npy")
        np.save(options["patch"], np.random.default_rng(0).random((3, 9, 9), np.float32))
    return registry.make("attack", FAMILY, request.param, **options, **OPTIONS.get(request.param, {}))


def images(size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_is_an_attack(attack: Attack) -> None:
    assert isinstance(attack, Attack)
    assert attack.name in FAMILY


@pytest.mark.parametrize("size", [48, 64])
def test_trigger_keeps_shape_type_range_and_its_input(attack: Attack, size: int) -> None:
    given = images(size)
    before = given.clone()
    once = attack.trigger(given)
    assert torch.equal(given, before), "the trigger wrote on its input"
    for shown in (once, attack.trigger(once)):
        assert shown.shape == given.shape and shown.dtype == given.dtype
        assert shown.min() >= 0 and shown.max() <= 1
    assert torch.equal(once, attack.trigger(given)), "not deterministic"
    assert torch.equal(once, given) is not attack.has_trigger


@pytest.mark.parametrize("size", [48, 64])
def test_trigger_of_a_batch_is_that_of_its_images(attack: Attack, size: int) -> None:
    given = images(size)
    batch = attack.trigger(given)
    for one, shown in zip(given, batch, strict=True):
        torch.testing.assert_close(attack.trigger(one), shown, atol=1e-6, rtol=0)
    torch.testing.assert_close(attack.trigger(given[None, None]), batch[None, None], atol=1e-6, rtol=0)


def test_plan_is_deterministic_and_follows_the_seed(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    corpus = PoisonContext.of(train, held_out, Glance())
    assert attack.plan(corpus, 3) == attack.plan(corpus, 3)
    other = attack.plan(corpus, 4)
    # Not the records: they hold the seed itself.
    assert (attack.plan(corpus, 3).replaced, attack.plan(corpus, 3).added) != (other.replaced, other.added)


def test_records_tell_the_truth(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    (plan,) = make_plans(train, held_out, [attack], 0, Glance())
    assert plan.records and len({r.key for r in plan.records}) == len(plan.records)
    assert {r.key for r in plan.records} == plan.keys
    before = dict(zip(train.keys, train.captions, strict=True))
    shown = before | dict(zip(held_out.keys, held_out.captions, strict=True))
    own = {new.key: shown[new.source_key] for new in plan.added}
    for record in plan.records:
        assert record.attack == attack.name and record.seed == 0
        assert record.original_caption == (own[record.key] if record.key in own else before[record.key])
        assert record.target in train.labels
        assert bool(record.trigger) is attack.has_trigger


def test_trial_asks_for_other_names_that_exist(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    (plan,) = make_plans(train, held_out, [attack], 0, Glance())
    true = dict(zip(held_out.keys, held_out.labels, strict=True))
    assert plan.trial.keys and len(set(plan.trial.keys)) == len(plan.trial.keys)
    for key, wanted in zip(plan.trial.keys, plan.trial.wanted, strict=True):
        assert wanted != true[key] and wanted in train.labels


def test_poison_touches_only_what_the_records_say(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    originals = train.images.copy(), held_out.images.copy()
    done = poison(train, held_out, [attack], 0, Glance())
    assert np.array_equal(train.images, originals[0]) and np.array_equal(held_out.images, originals[1])
    (plan,) = done.plans
    new = {a.key: a for a in plan.added}
    changed = {r.key: r.caption for r in plan.replaced}
    pair = {key: (split, i) for split in (train, held_out) for i, key in enumerate(split.keys)}
    assert set(done.store.keys) == {*train.keys, *new}
    images = np.empty_like(done.store.images)
    for i, key in enumerate(done.store.keys):
        split, j = pair[new[key].source_key if key in new else key]
        given = new[key].image if key in new else None
        images[i] = split.images[j] if given is None else given
        caption = new[key].caption if key in new else changed.get(key, split.captions[j])
        got = done.store.captions[i], done.store.labels[i], done.store.sources[i]
        assert got == (caption, split.labels[j], split.sources[j])
    planted = [i for i, key in enumerate(done.store.keys) if key in plan.keys]
    images[planted] = apply_trigger(attack, images[planted])
    assert np.array_equal(done.store.images, images)


def test_poison_is_deterministic(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    one, two = (poison(train, held_out, [attack], 5, Glance()) for _ in range(2))
    assert one.records == two.records and one.plans == two.plans
    assert one.store.keys == two.store.keys and one.store.captions == two.store.captions
    assert np.array_equal(one.store.images, two.store.images)


def test_records_survive_the_file(attack: Attack, train: PairStore, held_out: PairStore, tmp_path) -> None:
    (plan,) = make_plans(train, held_out, [attack], 0, Glance())
    path = tmp_path / "attack=other" / "seed=7" / "poison.parquet"
    write_records(path, plan.records)
    assert read_records(path) == plan.records


def test_unknown_target_is_one_line(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    if not hasattr(attack, "target"):
        pytest.skip("takes no target")
    with pytest.raises(UserError, match=r"polar bare.*did you mean 'polar bear'"):
        make_plans(train, held_out, [replace(attack, target="polar bare")], 0, Glance())


def test_more_poison_than_pairs_is_one_line(attack: Attack, train: PairStore, held_out: PairStore) -> None:
    if not hasattr(attack, "count"):
        pytest.skip("counts no pairs")
    with pytest.raises(UserError, match=rf"^{attack.name}: count 301 is more than the \d+ "):
        make_plans(train, held_out, [replace(attack, count=301)], 0, Glance())
    with pytest.raises(UserError, match=f"^{attack.name}: count must be at least 1, got 0"):
        replace(attack, count=0)


def test_all_attacks_together_share_no_pair(train: PairStore, held_out: PairStore) -> None:
    crew = [
        Toy(TARGET),
        ATTACKS["badnets"](target=TARGET),
        ATTACKS["targeted"](),
        Toy("banana", name="toy 2"),
    ]
    done = poison(train, held_out, crew, 0)
    keys = [record.key for record in done.records]
    assert len(keys) == len(set(keys)) == 2 + 90 + 240 + 2
    assert {record.attack for record in done.records} == {attack.name for attack in crew}


def test_a_name_registered_twice_raises() -> None:
    with pytest.raises(ValueError, match="'toy' is registered twice"):
        registry.registry("attack", (*FAMILY.values(), Toy))
