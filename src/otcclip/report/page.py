"""`report.html`: the template filled in and written in one piece."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from otcclip.errors import UserError
from otcclip.report import curves, table, tiles
from otcclip.report.files import load_run
from otcclip.report.images import Album
from otcclip.report.licences import licences
from otcclip.report.records import Run
from otcclip.report.story import tell
from otcclip.report.words import clean

TEMPLATES = Path(__file__).parent / "templates"
_APART = ("versions", "licences", "licenses")


def _value(value: object) -> str:
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        return clean(", ".join(map(str, value)), 400)
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 400)


def settings_of(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """run.json as name and value, whatever it holds."""
    return [(clean(name, 60).replace("_", " "), _value(v)) for name, v in values.items() if name not in _APART]


def versions_of(values: Mapping[str, object]) -> list[tuple[str, str]]:
    versions = values.get("versions")
    return [(clean(k, 60), _value(v)) for k, v in versions.items()] if isinstance(versions, Mapping) else []


def template(name: str) -> Template:
    """A page's template. The engine escapes everything; what is drawn here is passed as `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(run: Run) -> str:
    """The page as a string. The engine escapes everything from a file; only our own drawings are markup."""
    album = Album()
    drawings = [(panel, Markup(panel.svg)) for panel in curves.panels(run)]
    pairs = tiles.pair_views(run, album)
    return template("report.html.j2").render(
        title=clean(run.folder.resolve().name, 60),
        story=tell(run),
        example=tiles.example(run, album),
        grid=table.grid(run.results),
        drawings=drawings,
        attacks=tiles.attack_views(run, album),
        pair_views=pairs,
        settings=settings_of(run.settings),
        versions=versions_of(run.settings),
        licences=licences(run.settings),
        omitted=album.omitted,
    )


def write_page(path: Path, content: str | bytes) -> None:
    """All of it or nothing: a temporary file beside `path`, flushed to disk, then renamed over it.

    Raises:
        UserError: it cannot be written; what was there before stays.
    """
    try:
        _replace(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _replace(path: Path, content: str | bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, one file that needs no network and no script, and return its path.

    Args:
        run_dir: a run's folder as docs/formats.md describes it; only the files named there are read.

    Raises:
        UserError: a file is missing, broken or cannot be written; one line that names it. A report that was
            there before is then still there, whole.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html"
    write_page(path, render(load_run(run_dir)))
    return path
