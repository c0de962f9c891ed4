"""Carries attacks' plans out on stores held in memory, at the resolution the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from otcclip.attacks.base import Attack, PoisonContext, PoisonPlan, PoisonRecord, rng_for, unique_names
from otcclip.attacks.surrogate import Surrogate
from otcclip.data.pairs import PairStore
from otcclip.errors import UserError


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training store and its ground truth.

    Attributes:
        store: the training pairs, in a shuffled order. Labels (and sources) stay those of the image that is
            really shown: they are for evaluation.
        records: one a planted pair; the only place that says which pairs are poison.
        plans: one an attack, in the order given, with the trial its success is measured on.
    """

    store: PairStore
    records: tuple[PoisonRecord, ...]
    plans: tuple[PoisonPlan, ...]


def make_plans(
    train: PairStore, test: PairStore, attacks: Sequence[Attack], seed: int, surrogate: Surrogate | None = None
) -> tuple[PoisonPlan, ...]:
    """The plans `poison` carries out, without carrying them out: a clean model is judged on their trials.

    No pair is given to two attacks: each plans on what those before it left. Deterministic for stores, seed
    and surrogate, the model that white-box attacks look into.

    Raises:
        UserError: from an attack's plan; or two attacks of one name.
        ValueError: a plan that breaks its contract (a key that isn't free, records that don't match).
    """
    unique_names(attacks)
    context = PoisonContext.of(train, test, surrogate)
    plans: list[PoisonPlan] = []
    for attack in attacks:
        plan = attack.plan(context, seed)
        _check(plan, context)
        context = replace(context, train=context.train.without(plan.keys), keys_in_use=context.keys_in_use | plan.keys)
        plans.append(plan)
    return tuple(plans)


def poison(
    train: PairStore, test: PairStore, attacks: Sequence[Attack], seed: int, surrogate: Surrogate | None = None
) -> Poisoned:
    """`train` with the poison of `attacks` planted, shuffled.

    An image becomes float in 0..1, gets the trigger, and is rounded back to uint8 (`apply_trigger`), so a
    planted image is exactly what the same trigger gives at test. Neither position nor key tells a planted
    pair: order is a permutation drawn from `seed`, replaced pairs keep their key, added ones get keys like
    the corpus's own.

    Raises:
        UserError: as `make_plans`, and if the images of the two stores differ in size.
    """
    plans = make_plans(train, test, attacks, seed, surrogate)
    if plans and train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"poisoning: training images are {train.images.shape[1:]}, test images {test.images.shape[1:]}; "
            "load both at one size"
        )
    added = [new for plan in plans for new in plan.added]
    pair_of = {key: (split, i) for split in (train, test) for i, key in enumerate(split.keys)}
    origin = [pair_of[new.source_key] for new in added]
    keys = [*train.keys, *(new.key for new in added)]
    row = {key: i for i, key in enumerate(keys)}
    captions = [*train.captions, *(new.caption for new in added)]
    for change in (change for plan in plans for change in plan.replaced):
        captions[row[change.key]] = change.caption
    labels = [*train.labels, *(split.labels[i] for split, i in origin)]
    hands = [*train.sources, *(split.sources[i] for split, i in origin)] if train.sources and test.sources else []

    # One copy of the images: each goes straight to its place in the new order.
    order = rng_for("order of the pairs", seed).permutation(len(keys))
    place = np.argsort(order)
    images = np.empty((len(keys), *train.images.shape[1:]), np.uint8)
    images[place[: len(train)]] = train.images
    for at, new, (split, i) in zip(place[len(train) :], added, origin, strict=True):
        images[at] = split.images[i] if new.image is None else new.image
    for attack, plan in zip(attacks, plans, strict=True):
        planted = place[np.array([row[record.key] for record in plan.records], np.int64)]
        images[planted] = apply_trigger(attack, images[planted])

    def ordered(values: list[str]) -> tuple[str, ...]:
        return tuple(values[i] for i in order) if values else ()

    store = PairStore(ordered(keys), images, ordered(captions), ordered(labels), ordered(hands))
    return Poisoned(store, tuple(record for plan in plans for record in plan.records), plans)


def apply_trigger(attack: Attack, images: NDArray[np.uint8], batch: int = 256) -> NDArray[np.uint8]:
    """`images` `[n, H, W, 3]` uint8 under the attack's trigger, rounded back to uint8; a new array.

    What training saw and what a test shows both come from here.
    """
    out = np.array(images)
    if not attack.has_trigger:
        return out
    for start in range(0, len(out), batch):
        block = out[start : start + batch]
        floats = torch.from_numpy(block).permute(0, 3, 1, 2).float() / 255
        shown = attack.trigger(floats).permute(0, 2, 3, 1)
        out[start : start + batch] = (shown * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return out


def _check(plan: PoisonPlan, context: PoisonContext) -> None:
    """Hold a plan to its contract before anything is planted."""
    replaced, added = [r.key for r in plan.replaced], [a.key for a in plan.added]
    taken = {*context.train.keys, *context.test.keys, *context.keys_in_use}
    if sorted(replaced + added) != sorted(r.key for r in plan.records) or len(plan.keys) != len(plan.records):
        raise ValueError(f"{plan.attack}: records and planned pairs differ, or a pair is planned twice")
    if any(record.attack != plan.attack for record in plan.records):
        raise ValueError(f"{plan.attack}: a record names another attack")
    if stray := set(replaced) - set(context.train.keys):
        raise ValueError(f"{plan.attack}: replaces pairs that are not free: {sorted(stray)[:3]}")
    if clash := set(added) & taken:
        raise ValueError(f"{plan.attack}: adds pairs under keys in use: {sorted(clash)[:3]}")
    if stray := {a.source_key for a in plan.added} - {*context.train.keys, *context.test.keys}:
        raise ValueError(f"{plan.attack}: copies pairs that do not exist or are taken: {sorted(stray)[:3]}")
    if stray := set(plan.trial.keys) - set(context.test.keys):
        raise ValueError(f"{plan.attack}: names test pairs that do not exist: {sorted(stray)[:3]}")
