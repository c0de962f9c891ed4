"""`matrix.png`: the matrix as one picture, for a README."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from otcclip.report.matrix import REFERENCE, Block, Row, Square, blocks, columns
from otcclip.report.matrix_files import Matrix
from otcclip.report.words import NARROW, clean

HEAT = LinearSegmentedColormap.from_list("asr", ["#d9edea", "#f6ead9", "#e9a08c", "#b5391f"])
INK, MUTED, GREY = "#1c2126", "#5c656e", "#efece6"
CELL_W, CELL_H, SMALL_H, GAP_H, HEAD_H = 1.25, 0.5, 0.24, 0.14, 0.6  # inches
BELOW = {"Zero-shot top-1": "top-1", "Training time": "time"}  # rows below the attacks, and what they are called


def draw_matrix(matrix: Matrix) -> bytes:
    """A PNG: attacks against defences coloured by success, with accuracy and time of every group below its attacks."""
    names, lines = columns(matrix), _lines(blocks(matrix))
    left = 0.4 + 0.072 * max(len(line.label) for line in lines)
    width = max(left + CELL_W * len(names) + 0.15, 6.4)
    height = HEAD_H + sum(line.height for line in lines) + 0.4
    figure = Figure(figsize=(width, height), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for x, name in enumerate(names):
        words = "never\npoisoned" if name == REFERENCE else _wrapped(clean(name, 40))
        _write(axes, left + CELL_W * (x + 0.5), HEAD_H / 2, words, 9, weight="bold")
    top = HEAD_H
    for line in lines:
        middle = top + line.height - (CELL_H if line.row.kind == "attack" else SMALL_H) / 2
        colour = INK if line.row.kind == "attack" and line.row.is_test else MUTED
        _write(axes, left - 0.15, middle, line.label, 9 if line.row.kind == "attack" else 8, colour, ha="right")
        for x, square in enumerate(line.row.squares):
            _square(axes, left + CELL_W * x, middle, line.row, square)
        top += line.height
    legend = (
        "Attack success, mean over seeds. Hatched: not a test (under 80 % undefended), or the model learned little."
    )
    _write(axes, 0.15, height - 0.17, legend, 7.5, MUTED, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class _Line:
    row: Row
    label: str
    height: float


def _lines(groups: Sequence[Block]) -> list[_Line]:
    """The rows drawn, some space before each group; an attack that stands in several groups is told by its group."""
    often = Counter(row.label for block in groups for row in block.rows if row.kind == "attack")
    lines: list[_Line] = []
    for block in groups:
        for row in block.rows:
            if row.kind == "attack":
                label = row.label if often[row.label] == 1 else f"{row.label} in {block.label}"
                gap = GAP_H if lines and lines[-1].row.kind != "attack" else 0.0
                lines.append(_Line(row, clean(label, 36), CELL_H + gap))
            elif row.label in BELOW:
                gap = 0.06 if lines and lines[-1].row.kind == "attack" else 0.0
                lines.append(_Line(row, BELOW[row.label], SMALL_H + gap))
    return lines


def _square(axes: Axes, left: float, middle: float, row: Row, square: Square) -> None:
    centre = left + CELL_W / 2
    if row.kind != "attack":
        _write(axes, centre, middle, square.text, 8, MUTED)
        return
    hatched = square.state in ("not a test", "learned little")
    face = HEAT(square.level) if square.level is not None else GREY if hatched else "#ffffff"
    edge, hatch = ("#d6d1c7", "////") if hatched else (face, None)
    corner, size = (left + 0.02, middle - CELL_H / 2 + 0.02), (CELL_W - 0.04, CELL_H - 0.04)
    axes.add_patch(Rectangle(corner, *size, facecolor=face, edgecolor=edge, hatch=hatch))
    colour = "#ffffff" if (square.level or 0) > 0.88 else MUTED if square.level is None else INK
    _write(axes, centre, middle - 0.07 * bool(square.small), square.text, 9.5, colour)
    _write(axes, centre, middle + 0.12, square.small, 6.5, colour)


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str = INK,
    ha: str = "center",
    weight: str = "normal",
) -> None:
    # Names are a stranger's: a dollar sign is no mathematics here.
    text = text.replace(NARROW, "\u00a0")
    axes.text(x, y, text, fontsize=size, color=colour, ha=ha, va="center", weight=weight, parse_math=False)


def _wrapped(name: str) -> str:
    head, colon, options = name.partition(":")
    return f"{head}\n{options}" if colon else name
