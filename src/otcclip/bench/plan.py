"""What a matrix is made of: groups of attacks (`groups`), defences and seeds, and the cells they make.

    plan(BenchSpec("corpora/emoji", "runs/matrix", attacks=("plain", "badnets+sig"), defenses=("clip", "otcclip")))

A group is one poisoned corpus: its attacks are planted together, so one training serves them all. A cell is a group
under a defence with a seed; nothing outside the cell decides it, so its figures are the same alone and in any matrix.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from otcclip import attacks, defenses
from otcclip.bench.groups import NONE, Group, at_rate, parse_group, parse_groups
from otcclip.data.emoji_load import EmojiSplit
from otcclip.errors import UserError
from otcclip.seeds import check_seed
from otcclip.specs import Spec, options_of
from otcclip.training.experiment import RunSpec
from otcclip.training.loop import TrainConfig
from otcclip.training.setting import make_attacks, start_of, surrogate_of
from otcclip.training.targets import give_targets
from otcclip.training.white_box import plan_blindly, wants_model

UNDEFENDED = "clip"


@dataclass(frozen=True)
class BenchSpec:
    """A matrix as asked for; `plan` turns it into cells.

    Attributes:
        corpus: folder of the emoji corpus. out: the matrix's folder.
        attacks: groups, `spec+spec+...` or one of `groups.ALIASES`; `none` is the corpus as it is.
        defenses: specs. The undefended run is always there: without it no other figure means anything.
        poison_rates: each sets every attack's count to that share of the training pairs; none: the attacks' own counts.
        reference: also train undefended without poison, for the rates that no attack has earned. Attacks that look
            into a model and name none look into that run, so it is there for them in any case.
        utility: names of `training.utility.MEASURES` to take of every finished model.
    """

    corpus: str
    out: str
    attacks: tuple[str, ...] = ("plain",)
    defenses: tuple[str, ...] = (UNDEFENDED, "otcclip")
    seeds: tuple[int, ...] = (0, 1, 2)
    hold_out: str = "twemoji"
    target: str = "banana"
    epochs: int = TrainConfig.epochs
    poison_rates: tuple[float, ...] = ()
    reference: bool = True
    utility: tuple[str, ...] = ()


@dataclass(frozen=True)
class DefenseChoice:
    """A defence with its options set; `label` is its spec as text."""

    label: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training: a group under a defence with a seed; `utility` is measured of the finished model."""

    group: Group
    defense: DefenseChoice
    seed: int
    run: RunSpec
    utility: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def name(self) -> str:
        return f"{self.group.label} · {self.defense.label} · seed {self.seed}"

    @property
    def trial(self) -> str:
        """What the job is called that tries the cell's attacks on the model of `reference_of`."""
        return f"{self.name} · never poisoned"


def reference_of(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell without poison, of the same defence and seed, that the attacks of `cell` are to be tried on."""
    if not cell.group.attacks:
        return None
    like = (one for one in cells if not one.group.attacks)
    return next((one for one in like if (one.defense.label, one.seed) == (cell.defense.label, cell.seed)), None)


def parse_defense(text: str) -> DefenseChoice:
    """A defence's spec.

    Raises:
        UserError: an unknown defence or option, or a value it refuses.
    """
    spec = Spec.parse(text)
    options = options_of("defence", defenses.DEFENSES, spec)
    defenses.make(spec.name, **options)
    return DefenseChoice(str(spec), spec.name, options)


def plan(bench: BenchSpec, pairs: int) -> tuple[Cell, ...]:
    """The matrix's cells, undefended ones first within a seed; `pairs` is the number of training pairs.

    Raises:
        UserError: whatever `parse_group`, `parse_defense` and `at_rate` refuse, or nothing asked for.
    """
    if not (bench.attacks and bench.defenses and bench.seeds):
        raise UserError("bench: name at least one attack, one defence and one seed")
    if bench.epochs < 1:
        raise UserError(f"--epochs {bench.epochs}: at least 1")
    for seed in bench.seeds:
        check_seed(seed, "--seeds")
    groups = groups_of(bench, pairs)
    chosen = _with_starts([parse_defense(text) for text in (UNDEFENDED, *bench.defenses)])
    looks_in = any(wants_model(map(Spec.parse, group.attacks)) for group in groups)
    cells: dict[Path, Cell] = {}
    for seed in dict.fromkeys(bench.seeds):
        rows = [(group, choice) for group in groups for choice in chosen]
        if bench.reference or looks_in:
            rows.insert(0, (parse_group(NONE), chosen[0]))
        for group, choice in rows:
            cell = _cell(bench, group, choice, seed)
            cells.setdefault(cell.folder, cell)
    return tuple(cells.values())


def groups_of(bench: BenchSpec, pairs: int) -> tuple[Group, ...]:
    """The groups asked for, each at every rate asked for; `none` once."""
    groups: dict[str, Group] = {}
    for group in parse_groups(bench.attacks):
        at = [at_rate(group, rate, pairs) for rate in bench.poison_rates] if group.attacks else []
        groups |= {one.label: one for one in at or [group]}
    return tuple(groups.values())


def _with_starts(chosen: Sequence[DefenseChoice]) -> list[DefenseChoice]:
    """Each once; before one that fine-tunes, the defence whose model it starts from."""
    out: dict[str, DefenseChoice] = {}
    for choice in chosen:
        start = start_of(RunSpec("", "", choice.name, choice.options))
        if start is not None:
            first = parse_defense(start.defense)
            out.setdefault(first.label, first)
        out.setdefault(choice.label, choice)
    return list(out.values())


def _cell(bench: BenchSpec, group: Group, choice: DefenseChoice, seed: int) -> Cell:
    run = _run(bench, group, choice, seed)
    if wants_model(map(Spec.parse, group.attacks)):
        clean = _run(bench, parse_group(NONE), parse_defense(UNDEFENDED), seed)
        run = replace(run, surrogate=clean)
    return Cell(group, choice, seed, run, tuple(dict.fromkeys(bench.utility)))


def _run(bench: BenchSpec, group: Group, choice: DefenseChoice, seed: int) -> RunSpec:
    folder = Path(bench.out) / slug(group.label) / f"seed-{seed}"
    name = slug(choice.label)
    return RunSpec(
        corpus=bench.corpus,
        out=str(folder),
        defense=choice.name,
        options=choice.options,
        name="" if name == choice.name else name,
        hold_out=bench.hold_out,
        target=bench.target,
        attacks=group.attacks,
        seed=seed,
        epochs=bench.epochs,
        poisoned=bool(group.attacks),
        threads=1,
    )


def slug(label: str) -> str:
    """`label` as a folder's name; distinct labels give distinct names."""
    plain = re.sub(r"[^A-Za-z0-9.+@_-]+", "_", label)[:80].lstrip(".")
    return plain if plain == label else f"{plain}-{zlib.crc32(label.encode()):08x}"


def check_attacks(cells: Sequence[Cell], split: EmojiSplit) -> None:
    """Plan every group once, as its first seed would: what cannot be planted fails here, before any training.

    A group that looks into a model which is yet to be trained is planned as far as can be without it.

    Raises:
        UserError: an option out of range, a target that is no class of the corpus, more poison than pairs, two attacks
            of one name.
    """
    for cell in {cell.group.label: cell for cell in reversed(cells)}.values():
        if surrogate_of(cell.run) is None:
            attacks.make_plans(split.train, split.test, make_attacks(cell.run, split), cell.seed)
        else:
            specs = [Spec.parse(text) for text in cell.group.attacks]
            plan_blindly(give_targets(specs, split, cell.run.target, cell.seed), split, cell.seed)
