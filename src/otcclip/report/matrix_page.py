"""A matrix's `report.html` and `matrix.png`, from the files in its folder alone; a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from otcclip.report.matrix import REFERENCE, blocks, columns
from otcclip.report.matrix_files import Matrix, load_matrix
from otcclip.report.matrix_plot import draw_matrix
from otcclip.report.matrix_story import headline, standings, warnings
from otcclip.report.page import settings_of, template, versions_of, write_page
from otcclip.report.words import NARROW, clean, duration

_APART = ("versions", "groups", "failures", "calls", "wall_seconds", "defenses", "seeds")
PICTURE, PAGE = "matrix.png", "report.html"


def render_matrix(matrix: Matrix) -> str:
    """The page as a string; the engine escapes everything that comes from a file."""
    calls = matrix.settings.get("calls")
    return template("matrix.html.j2").render(
        title=clean(matrix.folder.resolve().name, 60),
        lines=headline(matrix),
        warnings=warnings(matrix),
        columns=[clean(name, 60) for name in columns(matrix)],
        standings=standings(matrix),
        blocks=blocks(matrix),
        groups=[(clean(name, 120), [clean(spec, 120) for spec in specs]) for name, specs in matrix.groups.items()],
        settings=settings_of({k: v for k, v in matrix.settings.items() if k not in _APART}),
        versions=versions_of(matrix.settings),
        wall=duration(matrix.wall_seconds),
        calls=len(calls) if isinstance(calls, list) else 0,
    )


def write_matrix(folder: Path) -> Path:
    """Write `report.html`, self-contained, and `matrix.png` into a matrix's folder; returns the page's path.

    Raises:
        UserError: a file is missing, broken or cannot be written, or no cell is finished yet.
    """
    matrix = load_matrix(folder)
    page, picture = folder / PAGE, folder / PICTURE
    text, png = render_matrix(matrix), draw_matrix(matrix)
    write_page(picture, png)
    write_page(page, text)
    return page


def matrix_table(folder: Path) -> Table:
    """The matrix for the terminal: a row an attack, a column a defence; names' control characters are stripped.

    Raises:
        UserError: as `load_matrix`.
    """
    matrix = load_matrix(folder)
    table = Table(title=Text(clean(folder.resolve().name, 60)), title_justify="left")
    table.add_column("ASR, mean over seeds", overflow="fold")  # many defences on a narrow terminal: no name is cut
    for name in columns(matrix):
        head = Text("never poisoned" if name == REFERENCE else clean(name, 40))
        table.add_column(head, justify="right", overflow="fold")
    for block in blocks(matrix):
        for row in block.rows:
            if row.kind != "attack" and row.label not in ("Zero-shot top-1", "Training time"):
                continue
            label = f"{row.label}{'' if row.is_test else ' (not a test)'}"
            squares = [
                Text(square.text.replace(NARROW, "\u00a0"), style=_style(square.state)) for square in row.squares
            ]
            table.add_row(Text(label, style="" if row.kind == "attack" and row.is_test else "dim"), *squares)
        table.add_section()
    return table


def _style(state: str) -> str:
    styles = {"stopped": "green", "lost": "red", "weakened": "yellow", "undefended": "red"}
    return styles.get(state, "dim" if state else "")
