"""A matrix laid out: a block a group, a row an attack, a measure or a cost, a column a defence.

A square holds the mean over seeds. Its interval reaches from the lowest seed's lower end to the highest seed's upper
end, each a 95 % Wilson interval: it covers every seed's model, and is wider than an interval of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from otcclip.report.matrix_files import NONE, Figure, Matrix, MatrixCell
from otcclip.report.records import UNDEFENDED, Rate
from otcclip.report.story import IS_A_TEST, LOST, STOPPED
from otcclip.report.words import NARROW, clean, count, duration, interval, listed, memory, of, percent

REFERENCE = "undefended, never poisoned"
MEASURES = {
    "acc1": "Zero-shot top-1",
    "acc5": "Zero-shot top-5",
    "probe/probe": "Linear probe, groups",
    "retrieval/text_at_1": "Text by image, R@1",
    "retrieval/text_at_5": "Text by image, R@5",
    "retrieval/image_at_1": "Image by text, R@1",
    "retrieval/image_at_5": "Image by text, R@5",
    "openclipart/text_at_5": "openclipart: text by image, R@5",
    "openclipart/image_at_5": "openclipart: image by text, R@5",
    "openclipart/probe": "openclipart: linear probe, folders",
    "fashion-mnist/probe": "Fashion-MNIST: linear probe",
}


@dataclass(frozen=True)
class Square:
    """One figure of the matrix.

    Attributes:
        text: the mean. small: its interval. seeds: every seed's figure, where there are several.
        hover: a line a seed, with everything known of it.
        level: attack success in 0…1, for the colour; None: no colour.
        state: `stopped`, `weakened`, `lost`, `undefended`, `not a test`, `learned little`, `reference` or "".
    """

    text: str = "–"
    small: str = ""
    seeds: str = ""
    hover: str = ""
    level: float | None = None
    state: str = ""


@dataclass(frozen=True)
class Row:
    """`kind` is attack, utility or cost; `note` stands under the label; `is_test` is False for an attack too weak."""

    label: str
    kind: str
    squares: list[Square]
    note: str = ""
    is_test: bool = True


@dataclass(frozen=True)
class Block:
    """A group of attacks planted in one corpus; `planted` says how much of what."""

    label: str
    planted: str
    rows: list[Row]


def columns(matrix: Matrix) -> list[str]:
    """Defences as columns, undefended first, the run that was never poisoned last."""
    named = [name for name in matrix.defenses if name != UNDEFENDED]
    return [UNDEFENDED, *named] + [REFERENCE] * bool(matrix.of(NONE, UNDEFENDED))


def blocks(matrix: Matrix) -> list[Block]:
    """The groups in the order they were asked for, those without a finished cell left out.

    So is the unpoisoned corpus where only the undefended run saw it: that is the last column.
    """
    shown = {group for group, defense, _ in matrix.cells if (group, defense) != (NONE, UNDEFENDED)}
    return [_block(matrix, group) for group in matrix.groups if group in shown]


def _block(matrix: Matrix, group: str) -> Block:
    rows = [attack_row(matrix, group, attack) for attack in matrix.attacks(group)]
    cells = [cell for (label, _, _), cell in matrix.cells.items() if label == group]
    measured = {name for cell in cells for name in cell.figures}
    rows += [_figure_row(matrix, group, name, label) for name, label in MEASURES.items() if name in measured]
    rows += [
        _cost_row(matrix, group, "Training time", lambda cell: cell.seconds, duration),
        _cost_row(matrix, group, "Peak memory", lambda cell: cell.memory, memory),
        _kept_row(matrix, group),
    ]
    planted = max(cells, key=lambda cell: len(cell.poison_total)).poison_total
    total = next((cell.pairs_total for cell in cells if cell.pairs_total), None)
    words = listed([f"{count(n)} {clean(name, 40)}" for name, n in planted.items()])
    return Block(clean(group, 120), f"{words} among {count(total)} pairs" if words else "no poison", rows)


def attack_row(matrix: Matrix, group: str, attack: str) -> Row:
    """Success of one attack under every defence."""
    undefended = {cell.seed: cell.attacks[attack] for cell in matrix.of(group, UNDEFENDED) if attack in cell.attacks}
    before = fmean(rate.asr for rate in undefended.values()) if undefended else None
    is_test = before is not None and before >= IS_A_TEST
    squares = []
    for name in columns(matrix):
        if name == REFERENCE:
            squares.append(_reference(matrix, group, attack))
            continue
        cells = [cell for cell in matrix.of(group, name) if attack in cell.attacks]
        square = _share(cells, [cell.attacks[attack] for cell in cells], [_poison(cell, attack) for cell in cells])
        if cells:
            mean = fmean(cell.attacks[attack].asr for cell in cells)
            state = _state(matrix, name, cells, mean, before) if is_test else "not a test"
            square = replace(square, state=state, level=mean if state not in ("not a test", "learned little") else None)
        squares.append(square)
    return Row(clean(attack, 60), "attack", squares, _attack_note(matrix, group, attack, undefended, before), is_test)


def _attack_note(matrix: Matrix, group: str, attack: str, undefended: dict[int, Rate], before: float | None) -> str:
    cells = [cell for (label, _, _), cell in matrix.cells.items() if label == group]
    targets = list(dict.fromkeys(cell.targets[attack] for cell in cells if attack in cell.targets))
    notes = [f"→ {clean(listed(targets), 80)}"] if targets else []
    weak = [f"seed {seed} ({percent(rate.asr)})" for seed, rate in undefended.items() if rate.asr < IS_A_TEST]
    if before is None:
        notes.append("no undefended run")
    elif before < IS_A_TEST:
        notes.append(f"not a test: {percent(before)} undefended")
    elif weak:
        notes.append(f"not a test in {listed(weak)}")
    return " · ".join(notes)


def _state(matrix: Matrix, defense: str, cells: Sequence[MatrixCell], mean: float, before: float | None) -> str:
    if defense == UNDEFENDED:
        return "undefended"
    if before is not None and mean >= LOST * before:
        return "lost"
    if learned_little(matrix, cells):
        return "learned little"
    return "stopped" if mean <= STOPPED else "weakened"


def learned_little(matrix: Matrix, cells: Sequence[MatrixCell]) -> bool:
    """Whether there is little in these models to fool: under half the undefended top-1."""
    pairs = [(cell, base) for cell in cells if (base := matrix.undefended(cell)) is not None]
    if not pairs:
        return False
    own, undefended = (fmean(cell.figures["acc1"].value for cell in side) for side in zip(*pairs, strict=True))
    return own < LOST * undefended


def _reference(matrix: Matrix, group: str, attack: str) -> Square:
    cells = [cell for cell in matrix.of(group, UNDEFENDED) if attack in cell.never_poisoned]
    return replace(_share(cells, [cell.never_poisoned[attack] for cell in cells], [""] * len(cells)), state="reference")


def _poison(cell: MatrixCell, attack: str) -> str:
    """What else is known of a cell's attack: how much poison was left, and what no poison gives."""
    parts = []
    if attack in cell.poison_total:
        parts.append(f"poison kept {of(cell.poison_kept.get(attack), cell.poison_total[attack])}")
    if attack in cell.never_poisoned:
        parts.append(f"never poisoned {percent(cell.never_poisoned[attack].asr)}")
    if attack in cell.swapped:
        swapped, chance = cell.swapped[attack]
        parts.append(f"texts that bring it up among ten images {percent(swapped)}, at random {percent(chance)}")
    return ", ".join(parts)


def _share(cells: Sequence[MatrixCell], rates: Sequence[Rate | Figure], more: Sequence[str]) -> Square:
    """The mean of a share over seeds."""
    if not cells:
        return Square()
    values = [rate.asr if isinstance(rate, Rate) else rate.value for rate in rates]
    lines = []
    for cell, rate, value, extra in zip(cells, rates, values, more, strict=True):
        known = f"{interval(rate.low, rate.high)}, n = {rate.n:,}" + (f"; {extra}" if extra else "")
        lines.append(f"seed {cell.seed}: {percent(value)} ({known})")
    return Square(
        text=percent(fmean(values)),
        small=interval(min(rate.low for rate in rates), max(rate.high for rate in rates)),
        seeds=_seeds([percent(value) for value in values]),
        hover="\n".join(lines),
    )


def _seeds(texts: Sequence[str]) -> str:
    if len(texts) < 2:
        return ""
    return " · ".join(text.removesuffix(f"{NARROW}%") for text in texts)


def _figure_row(matrix: Matrix, group: str, name: str, label: str) -> Row:
    squares = []
    for column in columns(matrix):
        source = matrix.of(*((NONE, UNDEFENDED) if column == REFERENCE else (group, column)))
        cells = [cell for cell in source if name in cell.figures]
        square = _share(cells, [cell.figures[name] for cell in cells], [""] * len(cells))
        squares.append(replace(square, seeds="", state="reference" if column == REFERENCE else ""))
    return Row(label, "utility", squares)


def _cost_row(
    matrix: Matrix,
    group: str,
    label: str,
    cost: Callable[[MatrixCell], float | None],
    words: Callable[[float | None], str],
) -> Row:
    """A cost as a multiple of the undefended run's, group and seed alike, and in its own unit."""
    squares = []
    for column in columns(matrix):
        cells = matrix.of(*((NONE, UNDEFENDED) if column == REFERENCE else (group, column)))
        known = [(cell, value) for cell in cells if (value := cost(cell)) is not None]
        ratios = [r for cell, value in known if (r := ratio(matrix, cell, value, cost)) is not None]
        square = Square()
        if known:
            own = words(fmean(value for _, value in known))
            lines = [f"seed {cell.seed}: {words(value)}" for cell, value in known]
            shown = f"{fmean(ratios):.2f}×" if ratios and column not in (UNDEFENDED, REFERENCE) else own
            square = Square(shown, own if shown != own else "", hover="\n".join(lines))
        squares.append(replace(square, state="reference" if column == REFERENCE else ""))
    return Row(label, "cost", squares)


def ratio(matrix: Matrix, cell: MatrixCell, value: float, cost: Callable[[MatrixCell], float | None]) -> float | None:
    """`value` over the same cost of the undefended run of the same group and seed."""
    base = matrix.undefended(cell)
    under = cost(base) if base is not None else None
    return value / under if under else None


def _kept_row(matrix: Matrix, group: str) -> Row:
    squares = []
    for column in columns(matrix):
        cells = [] if column == REFERENCE else matrix.of(group, column)
        known = [c for c in cells if c.pairs_kept is not None and c.pairs_total]
        shares = [(c.pairs_kept or 0) / (c.pairs_total or 1) for c in known]
        lines = [f"seed {c.seed}: {of(c.pairs_kept, c.pairs_total)}" for c in known]
        square = Square(percent(fmean(shares), 0), hover="\n".join(lines)) if known else Square()
        squares.append(square)
    return Row("Pairs kept", "cost", squares)
