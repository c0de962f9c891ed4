"""A matrix's folder, read and checked (docs/formats.md): bench.json, and each cell's cell.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otcclip.report.fields import Fields
from otcclip.report.files import fails
from otcclip.report.records import UNDEFENDED, Rate

BENCH, CELL, NEVER_POISONED = "bench.json", "cell.json", "never_poisoned.json"
NONE = "none"  # the group that plants nothing


@dataclass(frozen=True)
class Figure:
    """A share in 0…1 over `n` trials, with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class MatrixCell:
    """One cell.json.

    Attributes:
        attacks: attack -> success rate. targets: attack -> the class it argues for, where it is one class.
        figures: what the model is good for: `acc1`, `acc5`, and `measure/figure` of each utility measure.
        seconds: of training, the run it started from included. memory: peak, in bytes.
        never_poisoned: attack -> its rate on the same defence's model trained without poison.
        swapped: attack -> share of texts that bring up a swapped class among ten images, and of texts at random.
    """

    group: str
    defense: str
    seed: int
    attacks: Mapping[str, Rate]
    targets: Mapping[str, str]
    figures: Mapping[str, Figure]
    seconds: float | None
    memory: float | None
    pairs_kept: int | None
    pairs_total: int | None
    poison_kept: Mapping[str, int]
    poison_total: Mapping[str, int]
    never_poisoned: Mapping[str, Rate]
    swapped: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Matrix:
    """A matrix as far as it has got. `groups`: label -> the specs planted, in the order they were asked for."""

    folder: Path
    settings: Mapping[str, Any]
    groups: Mapping[str, list[str]]
    defenses: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[tuple[str, str, int], MatrixCell]
    failures: Mapping[str, str]
    wall_seconds: float | None

    def of(self, group: str, defense: str) -> list[MatrixCell]:
        """The cells of a group under a defence, a seed each."""
        found = (self.cells.get((group, defense, seed)) for seed in self.seeds)
        return [cell for cell in found if cell is not None]

    def attacks(self, group: str) -> list[str]:
        """The attacks of a group, in the order its cells name them."""
        cells = (cell for (label, _, _), cell in self.cells.items() if label == group)
        return list(dict.fromkeys(name for cell in cells for name in cell.attacks))

    def undefended(self, cell: MatrixCell) -> MatrixCell | None:
        """The undefended run of the same group and seed."""
        return self.cells.get((cell.group, UNDEFENDED, cell.seed))


def is_matrix(folder: Path) -> bool:
    """Whether `folder` is one of `otcclip bench`."""
    return (folder / BENCH).is_file()


def load_matrix(folder: Path) -> Matrix:
    """Everything a matrix has left in `folder` so far.

    Raises:
        UserError: a file is not what docs/formats.md says (the message names it), or no cell is finished.
    """
    path = folder / BENCH
    bench = Fields(str(path), _json(path))
    groups = {name: [str(spec) for spec in planted] for name, planted in _lists(bench, "groups")}
    found = [_cell(path) for path in sorted(folder.glob(f"*/seed-*/*/{CELL}"))]
    if not found:
        raise fails(folder, "no cell of this matrix is finished yet")
    for cell in found:
        groups.setdefault(cell.group, [])
    named = bench.value.get("defenses")
    defenses = [str(name) for name in named] if isinstance(named, list) else []
    return Matrix(
        folder=folder,
        settings=bench.value,
        groups=groups,
        defenses=tuple(dict.fromkeys([*defenses, *(cell.defense for cell in found)])),
        seeds=tuple(sorted({cell.seed for cell in found})),
        cells={(cell.group, cell.defense, cell.seed): cell for cell in found},
        failures={name: str(why) for name, why in bench.inner("failures").value.items()},
        wall_seconds=bench.number("wall_seconds"),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise fails(path, "not found; is this the folder of a matrix?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise fails(path, f"cannot be read as JSON ({type(error).__name__})") from None


def _lists(fields: Fields, name: str) -> Iterator[tuple[str, list[Any]]]:
    inner = fields.inner(name)
    for key, value in inner.value.items():
        if not isinstance(value, list):
            raise inner.fail(key, "a list")
        yield key, value


def _cell(path: Path) -> MatrixCell:
    fields = Fields(str(path), _json(path))
    n = fields.need("n", fields.count("n"))
    memory = fields.number("peak_memory_mib")
    clean = path.with_name(NEVER_POISONED)
    attacks = fields.inner("attacks")
    return MatrixCell(
        group=fields.text("attack"),
        defense=fields.text("defense"),
        seed=fields.need("seed", fields.count("seed")),
        attacks=fields.rates("attacks"),
        targets={name: str(target) for name in attacks.value if (target := attacks.inner(name).value.get("target"))},
        figures={**_accuracy(fields, n), **_utility(fields)},
        seconds=fields.number("seconds"),
        memory=None if memory is None else memory * 2**20,
        pairs_kept=fields.count("pairs_kept"),
        pairs_total=fields.count("pairs_total"),
        poison_kept=fields.counts("poison_kept"),
        poison_total=fields.counts("poison_total"),
        never_poisoned=Fields(str(clean), _json(clean)).rates("attacks") if clean.exists() else {},
        swapped={name: hits for name in attacks.value if (hits := _swapped(attacks.inner(name))) is not None},
    )


def _swapped(attack: Fields) -> tuple[float, float] | None:
    retrieval = attack.inner("retrieval")
    hits = [retrieval.inner(name).share("hit_at_10") for name in ("swapped", "random")]
    return None if hits[0] is None or hits[1] is None else (hits[0], hits[1])


def _accuracy(fields: Fields, n: int) -> dict[str, Figure]:
    metrics, intervals = fields.inner("metrics"), dict(_lists(fields, "intervals"))
    found = {}
    for name in ("acc1", "acc5"):
        low_high = intervals.get(name)
        if not low_high or len(low_high) != 2:
            raise fields.fail("intervals", f"two ends for {name}")
        ends = Fields(f"{fields.where}: field 'intervals'", dict(zip(("low", "high"), low_high, strict=True)))
        found[name] = _figure(ends, metrics.need(name, metrics.share(name)), n)
    return found


def _utility(fields: Fields) -> dict[str, Figure]:
    utility = fields.inner("utility")
    found = {}
    for measure in utility.value:
        taken = utility.inner(measure)
        for name in taken.value:
            rate = taken.inner(name)
            value, n = rate.need("value", rate.share("value")), rate.need("n", rate.count("n"))
            found[f"{measure}/{name}"] = _figure(rate, value, n)
    return found


def _figure(fields: Fields, value: float, n: int) -> Figure:
    low, high = (fields.need(end, fields.share(end)) for end in ("low", "high"))
    return Figure(value, n, low, high)
