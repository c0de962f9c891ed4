"""A store keeps its columns aligned, and says so when they are not."""

from __future__ import annotations

import numpy as np
import pytest

from otcclip.data import PairStore, concatenate


def store(*keys: str, labels: bool = True) -> PairStore:
    images = np.stack([np.full((4, 4, 3), ord(key), np.uint8) for key in keys])
    names = tuple(key.upper() for key in keys)
    return PairStore(keys, images, tuple(f"caption {k}" for k in keys), names if labels else (), names)


def test_take_keeps_every_column_in_the_order_asked_for() -> None:
    taken = store("a", "b", "c").take([2, 0])
    assert (taken.keys, taken.labels, taken.captions) == (("c", "a"), ("C", "A"), ("caption c", "caption a"))
    assert [int(image[0, 0, 0]) for image in taken.images] == [ord("c"), ord("a")]
    assert (len(taken), taken.image_size) == (2, 4)


def test_what_a_defence_sees_has_no_labels() -> None:
    bare = store("a").without_labels()
    assert (bare.labels, bare.sources, bare.captions) == ((), (), ("caption a",))
    assert bare.take([0]).labels == ()


def test_concatenate_keeps_only_the_columns_all_have() -> None:
    assert concatenate([store("a"), store("b")]).labels == ("A", "B")
    mixed = concatenate([store("a"), store("b", labels=False)])
    assert (mixed.keys, mixed.labels, mixed.sources) == (("a", "b"), (), ("A", "B"))


def test_columns_that_do_not_fit_are_refused() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="captions: expected 2"):
        PairStore(("a", "b"), images, ("x",))
    with pytest.raises(ValueError, match="not unique"):
        PairStore(("a", "a"), images, ("x", "y"))
    with pytest.raises(ValueError, match=r"expected \[n, H, W, 3\]"):
        PairStore(("a", "b"), images.astype(np.float32), ("x", "y"))  # type: ignore[arg-type]
