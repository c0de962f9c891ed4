"""Curves over epochs as inline SVG: matplotlib draws, the page's style sheet colours.

No text from a file enters a drawing: names stand in the page's own legends, where they are escaped (and
matplotlib would also read `$` in a name as mathematics).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from otcclip.report.records import HOUSE_DEFENSE, UNDEFENDED, DefenseFiles, Epoch, Run
from otcclip.report.words import clean, listed, percent

# Stand-ins that survive matplotlib and become CSS variables: 0x0a00xx is no colour anybody would ask for.
INK, GRID, SHADE = "#0a0001", "#0a0002", "#0a0003"
_VARIABLE = {INK: "--muted", GRID: "--line", SHADE: "--shade"}
COLOURS = 8
_VARIABLE |= {f"#0a001{i:x}": f"--c{i}" for i in range(COLOURS)}
_DASH = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Series:
    """One line; `colour` indexes the page's palette, `dash` the dash patterns, `band` is its low and high."""

    label: str
    colour: int
    dash: int
    x: list[int]
    y: list[float]
    band: tuple[list[float], list[float]] | None = None


@dataclass(frozen=True)
class Panel:
    """A drawing with its heading and legend; `note` says what is shaded."""

    title: str
    svg: str
    legend: tuple[Series, ...]
    note: str = ""


def colour_of(run: Run, defense: str) -> int:
    """0 is the undefended run, 1 the house's defence, then the rest in the order of the results."""
    if defense in (UNDEFENDED, HOUSE_DEFENSE):
        return (UNDEFENDED, HOUSE_DEFENSE).index(defense)
    others = [d.name for d in run.defenses if d.name not in (UNDEFENDED, HOUSE_DEFENSE)]
    return 2 + others.index(defense) % (COLOURS - 2)


def draw(series: Sequence[Series], warm_ups: Sequence[int], salt: str) -> str:
    """An `<svg>` of shares in 0…1 over epochs; `warm_ups` are the epochs at which some warm-up ends."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.subplots()
        last = max((x for line in series for x in line.x), default=1)
        for end in warm_ups:
            axes.axvspan(-0.5, end + 0.5, color=SHADE, alpha=0.35 if len(warm_ups) > 1 else 0.7, lw=0, zorder=0)
        for line in series:
            _line(axes, line)
        top = max((v for line in series for v in [*line.y, *(line.band[1] if line.band else [])]), default=1.0)
        axes.set(xlim=(-0.5, last + 0.5), ylim=(-0.02 * min(1.04, top * 1.12), min(1.04, max(0.05, top * 1.12))))
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue())


def _line(axes: mpl.axes.Axes, line: Series) -> None:
    colour = f"#0a001{line.colour:x}"
    marker = "o" if len(line.x) < 3 else None
    style = _DASH[line.dash % len(_DASH)]
    axes.plot(line.x, line.y, color=colour, ls=style, lw=2, marker=marker, ms=4, zorder=3, clip_on=False)
    if line.band:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.13, lw=0, zorder=2)


def _inline(svg: str) -> str:
    """Only the drawing: no prologue, no ids but those it refers to, no rule that leaks into the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in _VARIABLE.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return svg.strip()


def _over_epochs(
    run: Run,
    value: Callable[[Epoch], float | None],
    band: Callable[[Epoch], tuple[float, float]] | None = None,
) -> list[Series]:
    lines = []
    for defense in run.defenses:
        known = [(e, v) for e in defense.epochs if (v := value(e)) is not None]
        if known:
            bands = [band(e) for e, _ in known] if band else None
            lines.append(
                Series(
                    clean(defense.name, 40),
                    colour_of(run, defense.name),
                    1 if defense.name == UNDEFENDED else 0,
                    [e.epoch for e, _ in known],
                    [v for _, v in known],
                    ([low for low, _ in bands], [high for _, high in bands]) if bands else None,
                )
            )
    return lines


def _warm_up(defense: DefenseFiles) -> int | None:
    return max((e.epoch for e in defense.epochs if e.warm_up), default=None)


def _warm_up_note(defenses: Sequence[DefenseFiles]) -> str:
    ends = [(d.name, end) for d in defenses if (end := _warm_up(d)) is not None]
    parts = [f"{clean(name, 40)} ({end + 1} epoch{'s' if end else ''})" for name, end in ends]
    return f"Shaded: warm-up of {listed(parts)}." if parts else ""


def _kept(run: Run, defense: DefenseFiles) -> list[Series]:
    """The share of all pairs and of each attack's poison that the defence kept, epoch by epoch."""
    result = run.result(defense.name)
    if result is None:
        return []
    lines: list[Series] = []
    totals = {"": result.pairs_total, **result.poison_total}
    for name, total in totals.items():
        points = [(e.epoch, e.poison_kept.get(name) if name else e.kept) for e in defense.epochs]
        known = [(x, y / total) for x, y in points if y is not None and total]
        if known:
            label = f"poison kept: {clean(name, 40)}" if name else "all pairs kept"
            colour, dash = (0, len(lines)) if name else (1, 0)
            lines.append(Series(label, colour, dash, [x for x, _ in known], [min(1.0, y) for _, y in known]))
    return lines


def _trust_note(defense: DefenseFiles) -> str:
    """How well trust told poison from honest pairs, and re-pairing chose, at the last epoch that says so."""
    aurocs = next((e.trust_auroc for e in reversed(defense.epochs) if e.trust_auroc), {})
    precision = next((v for e in reversed(defense.epochs) if (v := e.repair_precision) is not None), None)
    parts = [f"trust AUROC for {clean(name, 40)} {value:.2f}" for name, value in aurocs.items()]
    parts += [] if precision is None else [f"repair precision {percent(precision)}"]
    return f"At the end: {listed(parts)}." if parts else ""


def panels(run: Run) -> list[Panel]:
    """Every drawing that has something to show: top-1, ASR of each attack, pairs kept by each defence."""
    ends = sorted({end for d in run.defenses if (end := _warm_up(d)) is not None})
    note = _warm_up_note(run.defenses)
    plans = [("Zero-shot top-1", _over_epochs(run, lambda e: e.top1), ends, note)]
    for name in run.attacks:

        def rate(e: Epoch, name: str = name) -> float | None:
            return e.attacks[name].asr if name in e.attacks else None

        def band(e: Epoch, name: str = name) -> tuple[float, float]:
            return e.attacks[name].low, e.attacks[name].high

        plans.append((f"ASR of {clean(name, 40)}", _over_epochs(run, rate, band), ends, note))
    for defense in run.defenses:
        end = _warm_up(defense)
        own = [] if end is None else [end]
        plans.append(
            (
                f"What {clean(defense.name, 40)} kept",
                _kept(run, defense),
                own,
                f"{_warm_up_note([defense])} {_trust_note(defense)}".strip(),
            )
        )
    return [
        Panel(title, draw(series, shaded, f"otcclip-{i}"), tuple(series), text)
        for i, (title, series, shaded, text) in enumerate(plans)
        if series
    ]
