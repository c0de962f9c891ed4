"""What a matrix says in a few lines: each defence over all attacks, the headline, and what a reader must know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from otcclip.report.matrix import REFERENCE, attack_row, columns, learned_little, ratio
from otcclip.report.matrix_files import NONE, Matrix, MatrixCell
from otcclip.report.records import HOUSE_DEFENSE, UNDEFENDED
from otcclip.report.story import IS_A_TEST, STOPPED
from otcclip.report.words import clean, listed, percent


@dataclass(frozen=True)
class Standing:
    """A defence over all attacks that are a test."""

    defense: str
    stopped: str
    mean: str
    worst: str
    worst_attack: str
    accuracy: str
    time: str


def fair_tests(matrix: Matrix) -> list[tuple[str, str]]:
    """Group and attack of every row whose undefended success makes it a test."""
    rows = [(group, attack) for group in matrix.groups for attack in matrix.attacks(group)]
    return [row for row in rows if attack_row(matrix, *row).is_test]


def mean_asr(matrix: Matrix, group: str, attack: str, defense: str) -> float | None:
    """Mean over seeds; None where no cell is finished."""
    rates = [cell.attacks[attack].asr for cell in matrix.of(group, defense) if attack in cell.attacks]
    return fmean(rates) if rates else None


def standings(matrix: Matrix) -> list[Standing]:
    """Every defence over the attacks that are a test, in the order of the columns."""
    rows = fair_tests(matrix)
    found = []
    for name in columns(matrix):
        if name == REFERENCE:
            continue
        rates = {row: asr for row in rows if (asr := mean_asr(matrix, *row, name)) is not None}
        cells = [cell for group in matrix.groups if group != NONE for cell in matrix.of(group, name)]
        worst = max(rates, key=lambda row: rates[row], default=None)
        little = name != UNDEFENDED and learned_little(matrix, cells)
        stopped = sum(asr <= STOPPED for asr in rates.values())
        found.append(
            Standing(
                defense=clean(name, 60),
                stopped="learned little" if little else f"{stopped} of {len(rates)}",
                mean=percent(fmean(rates.values()) if rates else None),
                worst=percent(rates[worst] if worst else None),
                worst_attack=clean(worst[1], 40) if worst else "",
                accuracy=_against(matrix, cells, lambda cell: cell.figures["acc1"].value),
                time=_times(matrix, cells),
            )
        )
    return found


def _against(matrix: Matrix, cells: Sequence[MatrixCell], value: Callable[[MatrixCell], float]) -> str:
    """Mean of a share, and its points above the undefended run, group and seed alike."""
    if not cells:
        return "–"
    gaps = [100 * (value(cell) - value(base)) for cell in cells if (base := matrix.undefended(cell)) is not None]
    mean = percent(fmean(value(cell) for cell in cells))
    return (
        mean
        if not gaps or cells[0].defense == UNDEFENDED
        else f"{mean} ({f'{fmean(gaps):+.1f}'.replace('-', '−')} points)"
    )


def _times(matrix: Matrix, cells: Sequence[MatrixCell]) -> str:
    ratios = [
        found
        for cell in cells
        if cell.seconds is not None and (found := ratio(matrix, cell, cell.seconds, lambda c: c.seconds)) is not None
    ]
    return f"{fmean(ratios):.2f}×" if ratios else "–"


def headline(matrix: Matrix) -> list[str]:
    """What the matrix is, and what became of the house's own defence in it: a sentence each."""
    attacks = sum(len(matrix.attacks(group)) for group in matrix.groups)
    named = [name for name in columns(matrix) if name not in (UNDEFENDED, REFERENCE)]
    seeds = len(matrix.seeds)
    lines = [
        f"{attacks} attack{'s' * (attacks != 1)} against {len(named)} defence{'s' * (len(named) != 1)}, "
        f"{seeds} seed{'s' * (seeds != 1)}"
    ]
    own = next((line for line in standings(matrix) if line.defense == HOUSE_DEFENSE), None)
    if own is not None and fair_tests(matrix):
        lines.append(
            f"{own.defense} stops {own.stopped} attacks that are a test; the worst, {own.worst_attack}, reaches "
            f"{own.worst}. Top-1 {own.accuracy}, {own.time} the undefended time."
        )
    return lines


def warnings(matrix: Matrix) -> list[str]:
    """What a reader must know before believing it."""
    lines = []
    expected = len([g for g in matrix.groups if g != NONE]) * len(matrix.defenses) * len(matrix.seeds)
    done = sum(cell.group != NONE for cell in matrix.cells.values())
    if done < expected:
        lines.append(f"{done} of {expected} cells are finished; means are over the seeds there are.")
    if len(matrix.seeds) < 3:
        lines.append(f"{len(matrix.seeds)} of the three seeds that a claim needs.")
    rows = [(group, attack) for group in matrix.groups for attack in matrix.attacks(group)]
    strong = fair_tests(matrix)
    weak = [f"{clean(attack, 40)} ({clean(group, 40)})" for group, attack in rows if (group, attack) not in strong]
    if weak:
        lines.append(f"Not a test, since undefended success stays under {percent(IS_A_TEST, 0)}: {listed(weak)}.")
    lines += [f"Not trained: {clean(name, 120)}: {clean(why, 240)}" for name, why in matrix.failures.items()]
    return lines
