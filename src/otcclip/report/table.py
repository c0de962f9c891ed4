"""The results, one row a run: for the terminal here, for the page in its template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from otcclip.report.files import load_results
from otcclip.report.records import NEVER_POISONED, UNDEFENDED, Rate, Result
from otcclip.report.story import verdict
from otcclip.report.words import NARROW, clean, duration, interval, memory, of, percent, wilson


@dataclass(frozen=True)
class Column:
    """A heading and what it means, for whoever hovers or listens."""

    title: str
    meaning: str = ""


@dataclass(frozen=True)
class Entry:
    """One cell: the figure, a fainter line under it, and for a rate its verdict and its bar from 0 to 1."""

    text: str
    small: str = ""
    verdict: str = ""
    rate: Rate | None = None


@dataclass(frozen=True)
class Grid:
    columns: list[Column]
    rows: list[list[Entry]]


def _attack_entry(result: Result, name: str, undefended: Result | None) -> Entry:
    rate = result.attacks.get(name)
    if rate is None:
        return Entry("–")
    small = f"{interval(rate.low, rate.high)}\nn = {rate.n:,}"
    if name in result.clean_asr and result.defense != NEVER_POISONED:
        small += f"\nnever poisoned {percent(result.clean_asr[name])}"
    if result.defense == NEVER_POISONED:
        return Entry(percent(rate.asr), small, "never poisoned", rate)
    word = "undefended" if result.defense == UNDEFENDED else verdict(undefended, result, name)
    return Entry(percent(rate.asr), small, word, rate)


def _accuracy(share: float, n: int | None) -> Entry:
    return Entry(percent(share), interval(*wilson(share, n)) if n else "")


def grid(results: Sequence[Result]) -> Grid:
    """The table's cells as text; columns that no run fills are left out."""
    attacks = list(dict.fromkeys(name for r in results for name in r.attacks))
    poisons = list(dict.fromkeys(name for r in results for name in r.poison_total or r.poison_kept))
    seeds, remembers = len({r.seed for r in results}) > 1, any(r.peak_memory is not None for r in results)
    columns = [Column("Defence")] + [Column("Seed")] * seeds
    columns += [Column("Top-1", "zero-shot accuracy on the test images"), Column("Top-5")]
    columns += [Column(f"ASR {clean(a, 40)}", "attack success rate, its 95 % Wilson interval") for a in attacks]
    columns += [Column("Pairs kept"), Column("Poison kept", "planted pairs still trained on at the end")]
    columns += [Column("Time")] + [Column("Peak memory")] * remembers
    rows = []
    for r in results:
        base = next((u for u in results if u.defense == UNDEFENDED and u.seed == r.seed), None)
        row = [Entry(clean(r.defense, 40))] + [Entry(str(r.seed))] * seeds
        row += [_accuracy(r.top1, r.test_images), _accuracy(r.top5, r.test_images)]
        row += [_attack_entry(r, name, base) for name in attacks]
        kept = [f"{clean(p, 40)} {of(r.poison_kept.get(p), r.poison_total.get(p))}" for p in poisons]
        row += [
            Entry(of(r.pairs_kept, r.pairs_total)),
            Entry("\n".join(kept) or "–"),
            Entry(duration(r.seconds)),
        ]
        row += [Entry(memory(r.peak_memory))] * remembers
        rows.append(row)
    return Grid(columns, rows)


_STYLE = {"stopped": "green", "lost": "red", "weakened": "yellow", "undefended": "red", "not a test": "dim"}


def results_table(run_dir: Path) -> Table:
    """results.json as a `rich` table: a column a run, so that a few runs fit a terminal of 80 characters.

    Each attack's rate stands over its 95 % interval and n. Names are a stranger's: control characters are
    stripped and markup is not read.

    Raises:
        UserError: results.json is missing or broken; the message names it.
    """
    cells = grid(load_results(run_dir))
    table = Table(title=Text(clean(run_dir.resolve().name, 60)), title_justify="left")
    table.add_column(Text(cells.columns[0].title))
    for row in cells.rows:
        table.add_column(Text(row[0].text), justify="right")
    for i, column in enumerate(cells.columns[1:], 1):
        table.add_row(Text(column.title), *(_terminal(row[i]) for row in cells.rows))
    return table


def _terminal(entry: Entry) -> Text:
    text = Text(entry.text.replace(NARROW, "\u00a0").replace(" of ", "/"), style=_STYLE.get(entry.verdict, ""))
    if entry.small:
        text.append("\n" + entry.small.replace(NARROW, "\u00a0"), style="dim")
    return text
