"""What decides a run (`RunSpec`), and the poisoned corpus that follows from it (`Setting`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from otcclip import __version__, attacks
from otcclip.attacks import Attack, PoisonPlan, PoisonRecord
from otcclip.data.emoji_load import EmojiSplit, load_emoji
from otcclip.data.pairs import PairStore
from otcclip.registry import find
from otcclip.training.loop import TrainConfig


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's result.

    Attributes:
        corpus: folder of the emoji corpus. out: folder the run's own folder goes into.
        options: the defence's own options, by name; its defaults where empty.
        name: the run's folder and its name in tables; the defence's name by default.
        poisoned: whether the attacks are planted; they are tried at test time either way.
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
    threads: int = 1

    @property
    def folder(self) -> Path:
        return Path(self.out) / (self.name or self.defense)

    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed or reused."""
        spec = {k: v for k, v in asdict(self).items() if k not in ("out", "threads", "corpus")}
        return {**json.loads(json.dumps(spec)), "version": __version__}


def make_attacks(spec: RunSpec) -> tuple[Attack, ...]:
    """The spec's attacks; those with a trigger argue for the spec's target."""
    for name in spec.attacks:
        find("attack", attacks.ATTACKS, name)
    return tuple(
        attacks.make(name, target=spec.target) if attacks.ATTACKS[name].has_trigger else attacks.make(name)
        for name in spec.attacks
    )


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
    chosen = make_attacks(spec)
    poisoned = attacks.poison(split.train, split.test, chosen, spec.seed)
    if not spec.poisoned:
        return Setting(split, split.train, (), poisoned.plans, chosen)
    return Setting(split, poisoned.store, poisoned.records, poisoned.plans, chosen)


def clean_reference(spec: RunSpec) -> RunSpec:
    """The undefended run on the same corpus without poison: the rates that no attack has earned."""
    return replace(spec, defense="clip", name="clip-clean", poisoned=False)
