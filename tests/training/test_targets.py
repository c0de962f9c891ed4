"""A class of its own for every attack of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from otcclip.data.emoji_load import EmojiSplit, load_emoji
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError
from otcclip.specs import Spec
from otcclip.training.setting import RunSpec, make_attacks
from otcclip.training.targets import give_targets


def store(labels: Sequence[str], hand: str) -> PairStore:
    keys = tuple(f"{hand}-{i}" for i in range(len(labels)))
    return PairStore(keys, np.zeros((len(labels), 4, 4, 3), np.uint8), tuple(labels), tuple(labels))


@pytest.fixture
def split() -> EmojiSplit:
    """`banana` has 4 training images, as have eight others; four more have too few, or no test image."""
    common = ["banana", *"abcdefgh"]
    train = store([name for name in [*common, "untested"] for _ in range(4)] + ["rare"] * 3, "train")
    test = store([*common, "rare", "unseen"], "test")
    return EmojiSplit(train, test, tuple(sorted({*train.labels, *test.labels})), "test")


def targets(texts: Sequence[str], split: EmojiSplit, seed: int = 0, first: str = "banana") -> list[str | None]:
    given = give_targets([Spec.parse(text) for text in texts], split, first, seed)
    return [dict(spec.options).get("target") for spec in given]


def test_the_first_gets_the_runs_target_and_the_others_one_each(split: EmojiSplit) -> None:
    found = targets(["targeted", "badnets", "sig", "blended", "wanet"], split)
    assert found[:2] == [None, "banana"], "an attack without a target is given none"
    assert len(set(found[1:])) == 4 and set(found[2:]) <= set("abcdefgh")


def test_draws_follow_the_seed_and_the_attacks_name(split: EmojiSplit) -> None:
    drawn = Counter(targets(["badnets", "sig"], split, seed)[1] for seed in range(200))
    assert set(drawn) == set("abcdefgh"), "every class that fits, and no other, is drawn by some seed"
    assert targets(["badnets", "sig"], split, 5) == targets(["badnets", "sig"], split, 5)
    alone, more = targets(["badnets", "sig"], split, 5), targets(["badnets", "sig", "blended"], split, 5)
    assert more[:2] == alone, "an attack named later changes no target"


def test_a_target_that_is_named_stays(split: EmojiSplit) -> None:
    assert targets(["badnets:target=a", "sig"], split) == ["a", "banana"]
    found = targets(["badnets:target=banana", "sig:target=a", "blended"], split)
    assert found[:2] == ["banana", "a"] and found[2] in "bcdefgh"


def test_too_few_classes_is_one_line(split: EmojiSplit) -> None:
    ten = [f"badnets:name=b{i}" for i in range(10)]
    assert len(set(targets(ten[:9], split))) == 9
    with pytest.raises(UserError, match="no class is left for a target of its own"):
        targets(ten, split)


def test_make_attacks_reads_options(small_emoji: Path) -> None:
    split = load_emoji(small_emoji, 64, "twemoji")
    spec = RunSpec(str(small_emoji), "", "clip", attacks=("badnets:count=7", "targeted:images=2"), target="rocket")
    badnets, targeted = make_attacks(spec, split)
    assert (badnets.count, badnets.target, targeted.images) == (7, "rocket", 2)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="unknown attack 'badnet'"):
        make_attacks(replace(spec, attacks=("badnet",)), split)
