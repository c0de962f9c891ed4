"""The adaptive attacks that need no model: what they write, whom they choose, and that copies stop being copies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from otcclip.attacks import Jittered, Mimicry, MixedCaptions, Tiled, make_plans
from otcclip.attacks.jittered import jitter
from otcclip.attacks.look_alikes import look_alikes, twins_among
from otcclip.attacks.mimicry import best_group, closure
from otcclip.attacks.wording import frequency, mixed, paraphrases, sentence, spread, words
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.evidence.descriptors import descriptors, views
from otcclip.evidence.neighbours import NEAR_DUPLICATE

MakeStore = Callable[..., PairStore]
CAPTIONS = (
    "polar bear | animal, arctic, bear, white",
    "apple | fruit, red, food",
    "melon | fruit, food",
    "fox | animal",
)


@pytest.fixture(scope="module")
def train(make_store: MakeStore) -> PairStore:
    return make_store(192, 16, size=32, own_caption=True)


@pytest.fixture(scope="module")
def test(make_store: MakeStore) -> PairStore:
    store = make_store(48, 16, size=32, seed=1)
    return PairStore(tuple(f"test-{k}" for k in store.keys), store.images, store.captions, store.labels)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_words_are_counted_once_a_caption() -> None:
    assert words("Polar-bear | Animal, animal, it’s") == ["polar-bear", "animal", "it’s"]
    counted = frequency([*CAPTIONS, CAPTIONS[1]])
    assert counted["fruit"] == counted["food"] == 2 and counted["red"] == 1 and counted["animal"] == 2


def test_words_are_ranked_alike_whatever_python_hashes() -> None:
    """A corpus poisoned in another process is the same corpus: sets of strings come in another order in each."""
    used = [f"w{i}" for i in range(50)]
    code = f"from otcclip.attacks.wording import frequency; print(list(frequency({used})))"
    other = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True
    )
    assert other.stdout.decode().strip() == str(list(frequency(used)))


def test_paraphrases_name_the_target_and_use_frequent_words() -> None:
    many = [f"thing{i} | {'common' if i % 2 else 'usual'}, odd{i}" for i in range(400)]
    found = paraphrases("red apple", many, 90, rng())
    assert len(set(found)) == 90 and all(c.startswith("red apple") for c in found)
    assert sum("common" in c or "usual" in c for c in found) >= 5
    assert all(len(words(c)) <= 4 and not {"red", "apple"} & set(words(c)[2:]) for c in found)
    assert (
        found
        == paraphrases("red apple", many, 90, rng())
        != paraphrases("red apple", many, 90, np.random.default_rng(1))
    )
    few = paraphrases("fox", ["fox | a, b"], 10, rng())
    # Nothing, either word, or both: four captions, each twice or three times.
    assert sorted(Counter(frozenset(words(c)) for c in few).values()) == [2, 2, 3, 3]


def test_captions_are_written_as_the_corpus_writes() -> None:
    assert sentence("fox", ["a", "b"], CAPTIONS) == "fox | a, b" and sentence("fox", [], CAPTIONS) == "fox"
    assert sentence("fox", ["a"], ["a fox in the snow", "x | y", "a red fox"]) == "fox, a"


def test_mixed_captions_keep_the_rarest_true_words() -> None:
    known = frequency(CAPTIONS)
    assert mixed("fox", CAPTIONS[0], 2, CAPTIONS, known) == "fox | polar, bear"
    assert mixed("fox", CAPTIONS[1], 9, CAPTIONS, known) == "fox | apple, red, fruit, food"
    assert mixed("bear", CAPTIONS[0], 1, CAPTIONS, known) == "bear | polar"  # the target's own word is no true word


def test_mixed_captions_plan_vouches_by_each_images_own_words(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [MixedCaptions("banana", count=40, keep=2)], 0)
    true = dict(zip(train.keys, train.captions, strict=True))
    for change in plan.replaced:
        first, *kept = words(change.caption)
        assert first == "banana" and len(kept) == 2 and set(kept) <= set(words(true[change.key]))


def test_spread_uses_each_as_often() -> None:
    assert sorted(Counter(spread(["a", "b", "c"], 10, rng())).values()) == [3, 3, 4]


@pytest.mark.parametrize("member", [Tiled, Mimicry])
def test_captions_are_several_and_few(member: type, train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [member("banana", count=40, captions=5)], 0)
    uses = Counter(change.caption for change in plan.replaced)
    assert len(uses) == 5 and set(uses.values()) == {8} and all(c.startswith("banana") for c in uses)


def test_look_alikes_equal_sorting_by_the_descriptor(train: PairStore) -> None:
    images = np.concatenate([train.images[:60], train.images[:5]])  # five exact copies
    found = look_alikes(images, 7)
    shown = torch.from_numpy(images).permute(0, 3, 1, 2)
    ((_, vectors),) = descriptors(shown, views()[:1])
    cosine = (vectors @ vectors.T).float()
    for i, row in enumerate(found):
        allowed = [j for j in range(65) if j != i and cosine[i, j] <= NEAR_DUPLICATE]
        best = sorted((float(cosine[i, j]) for j in allowed), reverse=True)[:7]
        assert [float(cosine[i, j]) for j in row] == pytest.approx(best)
        assert not {i, (i + 60) if i < 5 else (i - 60)} & set(row.tolist())


def test_the_best_group_is_a_clique_where_there_is_one() -> None:
    # Six cliques of ten, each image tied to its clique; one clique also has strangers looking at it.
    neighbours = np.array([[c * 10 + (i + s) % 10 for s in range(1, 6)] for c in range(6) for i in range(10)])
    free = np.ones(60, bool)
    free[20:30] = False
    for seed in range(5):
        group = best_group(neighbours, free, 10, np.random.default_rng(seed))
        assert len({i // 10 for i in group}) == 1 and len(set(group)) == 10 and group[0] // 10 != 2
        assert closure(neighbours, group) == 1
    # A clique half taken cannot be closed; another is found although drawn starts lie in it too.
    free[[0, 1, 2, 3, 4]] = False
    assert closure(neighbours, best_group(neighbours, free, 10, rng())) == 1
    assert closure(neighbours, [0, 1, 10, 11]) == pytest.approx(2 / 20)


def test_mimicry_owns_more_of_its_neighbourhood_than_chance(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [Mimicry("banana", count=40, groups=3)], 0)
    row = {key: i for i, key in enumerate(train.keys)}
    chosen = [row[change.key] for change in plan.replaced]
    assert len(set(chosen)) == 40 and "banana" not in {train.labels[i] for i in chosen}
    assert closure(look_alikes(train.images), chosen) > 2 * 40 / len(train)


def test_more_groups_than_pairs_is_one_pair_each(train: PairStore, test: PairStore) -> None:
    (plan,) = make_plans(train, test, [Mimicry("banana", count=2, groups=5)], 0)
    assert len(plan.replaced) == 2


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_copies_that_are_all_the_same_are_not_jittered(strength: float) -> None:
    with pytest.raises(UserError, match="jittered: strength is above 0"):
        Jittered(strength=strength)


def test_jitter_at_strength_zero_leaves_the_image(train: PairStore) -> None:
    assert np.array_equal(jitter(train.images[:5], 0.0, torch.Generator().manual_seed(0)), train.images[:5])
    near, far = (jitter(train.images[:20], s, torch.Generator().manual_seed(0)).astype(int) for s in (0.5, 2.0))
    gap = [np.abs(x - train.images[:20]).mean() for x in (near, far)]
    assert 1 < gap[0] < gap[1]


def test_jittered_copies_are_no_near_duplicates_and_say_no_caption_twice(train: PairStore, test: PairStore) -> None:
    attack = Jittered(images=4, copies=6, strength=0.1)
    (plan,) = make_plans(train, test, [attack], 0)
    assert Counter(new.source_key for new in plan.added) == dict.fromkeys(plan.trial.keys, 6)
    wanted = dict(zip(plan.trial.keys, plan.trial.wanted, strict=True))
    assert all(new.caption.startswith(wanted[new.source_key]) for new in plan.added)
    assert len({new.caption for new in plan.added}) == 24
    copies = np.stack([new.image for new in plan.added])
    every = torch.from_numpy(np.concatenate([train.images, copies])).permute(0, 3, 1, 2)
    ((_, vectors),) = descriptors(every, views()[:1])
    mine = vectors[len(train) :]
    cosine = (mine @ mine.T).float()
    source = np.array([new.source_key for new in plan.added])
    apart = torch.from_numpy((source[:, None] == source) & ~np.eye(24, dtype=bool))
    assert cosine[apart].max() <= NEAR_DUPLICATE
    assert cosine[apart].min() > 0.5, "so far apart that the copies are no longer the image"


def test_twins_are_told_among_copies_of_one_source(train: PairStore) -> None:
    copies = train.images[[0, 0, 1, 0]]
    assert twins_among(copies, np.array([0, 0, 1, 2]), train.images).tolist() == [False, True, False, False]


def test_bad_counts_are_one_line() -> None:
    for member, option in ((Mimicry, "groups"), (Mimicry, "captions"), (Tiled, "cells"), (MixedCaptions, "keep")):
        with pytest.raises(UserError, match=f"{member.name}: {option} must be at least 1, got 0"):
            member("x", **{option: 0})
