"""What decides a run (`RunSpec`), and the poisoned corpus that follows from it (`Setting`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from otcclip import __version__, attacks, defenses
from otcclip.attacks import Attack, PoisonPlan, PoisonRecord, load_surrogate
from otcclip.data.emoji_load import EmojiSplit, corpus_digest, load_emoji
from otcclip.data.pairs import PairStore
from otcclip.defenses import DEFENSES, Defense
from otcclip.defenses.base import FineTuner
from otcclip.errors import UserError
from otcclip.seeds import check_seed
from otcclip.specs import Spec, options_of
from otcclip.training.loop import TrainConfig
from otcclip.training.targets import give_targets
from otcclip.training.white_box import file_digests, wants_model, with_patch


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's result.

    Attributes:
        corpus: folder of the emoji corpus. out: folder the run's own folder goes into.
        options: the defence's own options, by name; its defaults where empty.
        name: the run's folder and its name in tables; the defence's name by default.
        attacks: specs, `name[:option=value,...]` (otcclip.specs). target: class of the first attack that wants one
            and names none; the others of the run get a class of their own each (otcclip.training.targets).
        poisoned: whether the attacks are planted; they are tried at test time either way.
        surrogate: the finished run that white-box attacks look into, where they name no model themselves.
        start: the finished run that a fine-tuning defence starts from; this one under the defence it names by default.
        trusted_share: honest pairs that are handed to a fine-tuning defence as trusted, as a share of all; others
            never learn of any.

    Raises:
        UserError: a seed out of range (`otcclip.seeds`).
    """

    corpus: str
    out: str
    defense: str
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    hold_out: str | None = None
    target: str = "banana"
    attacks: tuple[str, ...] = ("badnets", "targeted")
    seed: int = 0
    epochs: int = TrainConfig.epochs
    batch_size: int = TrainConfig.batch_size
    lr: float = TrainConfig.lr
    model: str = "otcclip-tiny"
    poisoned: bool = True
    surrogate: RunSpec | None = None
    start: RunSpec | None = None
    trusted_share: float = 0.05
    threads: int = 1

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def folder(self) -> Path:
        return Path(self.out) / (self.name or self.defense)

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed or reused: where files lie is no part of it, what they hold is."""
        elsewhere = ("out", "threads", "corpus", "start", "trusted_share", "surrogate")
        spec = {k: v for k, v in asdict(self).items() if k not in elsewhere}
        files = {"corpus": corpus_digest(self.corpus), **file_digests(map(Spec.parse, self.attacks))}
        identity = {**json.loads(json.dumps(spec)), "version": __version__, "files": files}
        if (start := start_of(self)) is not None:
            identity |= {"start": start.identity(), "trusted_share": self.trusted_share}
        if (surrogate := surrogate_of(self)) is not None:
            identity |= {"surrogate": surrogate.identity()}
        return identity


def start_of(spec: RunSpec) -> RunSpec | None:
    """The run that must be finished before this one; None unless its defence fine-tunes."""
    starts_from = getattr(DEFENSES.get(spec.defense), "starts_from", None)
    if starts_from is None:
        return None
    return spec.start or replace(spec, defense=starts_from, options={}, name="")


def surrogate_of(spec: RunSpec) -> RunSpec | None:
    """The run that must be finished before this one is poisoned; None unless an attack looks into a model."""
    return spec.surrogate if wants_model(map(Spec.parse, spec.attacks)) else None


def train_config(spec: RunSpec, defense: Defense) -> TrainConfig:
    """The spec's training settings; a fine-tuning defence has a budget and a learning rate of its own."""
    config = TrainConfig(epochs=spec.epochs, batch_size=spec.batch_size, lr=spec.lr, seed=spec.seed)
    if isinstance(defense, FineTuner):
        return replace(config, epochs=max(1, round(spec.epochs * defense.epoch_share)), lr=defense.lr)
    return config


def total_epochs(spec: RunSpec) -> int:
    """Lines that the run's history will have."""
    defense = defenses.make(spec.defense, **spec.options)
    return defense.warmup_epochs + train_config(spec, defense).epochs


def make_attacks(spec: RunSpec, split: EmojiSplit) -> tuple[Attack, ...]:
    """The spec's attacks; those that want a target and name none are given one (`training.targets`).

    Raises:
        UserError: an unknown attack or option, a value it refuses, too few classes for the targets, or a surrogate
            that is no finished run.
    """
    run = surrogate_of(spec)
    model, folder = (None, None) if run is None else (load_surrogate(run.folder), run.folder)
    made = []
    for one in give_targets([Spec.parse(text) for text in spec.attacks], split, spec.target, spec.seed):
        ready = with_patch(one, split, model, folder, spec.seed)
        made.append(attacks.make(ready.name, **options_of("attack", attacks.ATTACKS, ready)))
    return tuple(made)


@dataclass(frozen=True)
class Setting:
    """A poisoned corpus with everything needed to judge what was learned from it."""

    split: EmojiSplit
    train: PairStore
    records: tuple[PoisonRecord, ...]
    plans: tuple[PoisonPlan, ...]
    attacks: tuple[Attack, ...]


def make_setting(spec: RunSpec, image_size: int) -> Setting:
    """Load the corpus and plant the poison; the same spec gives the same pairs in every process."""
    split = load_emoji(spec.corpus, image_size, spec.hold_out)
    chosen = make_attacks(spec, split)
    run = surrogate_of(spec)
    model = None if run is None else load_surrogate(run.folder)
    poisoned = attacks.poison(split.train, split.test, chosen, spec.seed, model)
    if not spec.poisoned:
        return Setting(split, split.train, (), poisoned.plans, chosen)
    return Setting(split, poisoned.store, poisoned.records, poisoned.plans, chosen)


def trusted_keys(spec: RunSpec, setting: Setting) -> list[str]:
    """A seeded sample of honest pairs, `trusted_share` of all pairs: what a user would vouch for after a look.

    Only the experiment can draw it, since only the experiment knows the truth.

    Raises:
        UserError: a share outside (0, 1], or one that is not honest pairs' to give.
    """
    poison = {record.key for record in setting.records}
    honest = [key for key in setting.train.keys if key not in poison]
    count = round(spec.trusted_share * len(setting.train))
    if not 0 < spec.trusted_share <= 1 or not 2 <= count <= len(honest):
        raise UserError(
            f"trusted share {spec.trusted_share}: of {len(setting.train)} pairs {len(honest)} are honest; at least 2 "
            "and at most all of those can be trusted"
        )
    rows = np.random.default_rng([spec.seed, len(honest)]).choice(len(honest), count, replace=False)
    return [honest[row] for row in sorted(rows.tolist())]


def clean_reference(spec: RunSpec) -> RunSpec:
    """The undefended run on the same corpus without poison: the rates that no attack has earned."""
    return replace(spec, defense="clip", name="clip-clean", poisoned=False)
