"""The losses of a small run, written down: whoever changes the maths of training by accident sees it here.

Everything is named in the test, so that a change of a default changes nothing here. Where the maths is meant to change,
run the test, read the new figures from its message and say in the commit why they moved.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from otcclip import defenses
from otcclip.data.pairs import PairStore
from otcclip.defenses.base import training_pairs
from otcclip.models import create_two_tower
from otcclip.training.augment import Augment
from otcclip.training.loop import TrainConfig, Trainer

CONFIG = TrainConfig(
    epochs=4,
    batch_size=32,
    lr=2e-3,
    weight_decay=3.0,
    warmup=0.25,
    grad_clip=1.0,
    precision="fp32",
    seed=3,
    caption_crop=0.5,
    augment=Augment(shift=0.06, zoom=0.1, rotate=0.1, colour=0.2, grey=0.1, blur=0.1, flip=0.1),
)
GOLDEN = [3.78825, 3.68575, 3.23095]


def test_losses_of_undefended_clip(make_store: Callable[..., PairStore]) -> None:
    model = create_two_tower("otcclip-tiny", seed=3)
    pairs = training_pairs(make_store(128, 16, own_caption=True, seed=3), model)
    epochs = Trainer(model, defenses.make("clip"), pairs, CONFIG).epochs()
    losses = [report.loss for report in islice(epochs, len(GOLDEN))]
    assert losses == pytest.approx(GOLDEN, rel=1e-3)
