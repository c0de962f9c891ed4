"""`report.html` of a scan: what was found, a gallery of the worst pairs, and every row behind a pager. One file, no
network.

    write_scan_report(Path("scan"))

Captions are a stranger's text. In the page they are data: compressed, decoded by the page's one script, and written
with `textContent`. A content security policy lets only that script run, by its hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from otcclip.report.images import Album
from otcclip.report.page import TEMPLATES, template, write_page
from otcclip.report.scan_files import ACTIONS, ScanFiles, load_scan
from otcclip.report.scan_plots import histogram_svg
from otcclip.report.words import clean, percent

CAPTION = 160  # characters of a caption that are shown


def write_scan_report(folder: Path) -> Path:
    """Write `report.html` into a scan's folder and return its path.

    Raises:
        UserError: a file is missing or broken, or the page cannot be written; a page there before stays.
    """
    folder = Path(folder)
    path = folder / "report.html"
    write_page(path, render(load_scan(folder)))
    return path


def render(scan: ScanFiles) -> str:
    """The page as a string."""
    script = (TEMPLATES / "scan.js").read_text("utf-8")
    album = Album()
    data = base64.b64encode(gzip.compress(json.dumps(_data(scan, album)).encode(), mtime=0)).decode()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template("scan.html.j2").render(
        title=clean(scan.folder.resolve().name, 60),
        script=Markup(script),
        script_hash=digest,
        data=data,
        summary=scan.summary,
        actions=[(name, scan.summary["actions"].get(name, 0)) for name in ACTIONS],
        skipped=sorted(((clean(k, 60), v) for k, v in scan.summary.get("skipped", {}).items()), key=lambda x: -x[1]),
        reasons=list(scan.reasons.items()),
        failed=[clean(why, 200) for why in scan.summary.get("failed", {}).values()],
        plots=_plots(scan),
        truth=_truth(scan),
        total=scan.total,
        shown=scan.rows.num_rows,
        pictures=len(scan.pictures),
        drawn=any(picture.own_heat for picture in scan.pictures.values()),
        settings=_settings(scan),
        omitted=album.omitted,
    )


def _data(scan: ScanFiles, album: Album) -> dict[str, Any]:
    """Columns of the rows, as the page's script reads them."""
    rows = scan.rows
    pictures = {
        key: [album.uri(picture.image), _heat(picture.own_heat), _heat(picture.best_heat), picture.attack]
        for key, picture in scan.pictures.items()
    }
    keys = rows["key"].to_pylist()
    return {
        "key": [clean(key, 80) for key in keys],
        "picture": [pictures.get(key) for key in keys],
        "caption": [clean(caption, CAPTION) for caption in rows["caption"].to_pylist()],
        "best": [clean(caption, CAPTION) for caption in rows["best_caption"].to_pylist()],
        "action": [ACTIONS.index(name) for name in rows["action"].to_pylist()],
        "copies": rows["copies"].to_pylist(),
        "word": [word and clean(word, 40) for word in rows["doubtful_word"].to_pylist()],
        "scores": {
            name: _short(rows[column].to_pylist())
            for name, column in {"lie": "lie", "p-value": "p_value", **scan.scores}.items()
        },
    }


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") if math.isfinite(value) else 0.0 for value in values]


def _heat(values: list[float] | None) -> list[float] | None:
    """0 to 1 within the image; None unless the cells are a square grid."""
    if not values or math.isqrt(len(values)) ** 2 != len(values) or not all(math.isfinite(v) for v in values):
        return None
    low, high = min(values), max(values)
    return [round((v - low) / (high - low), 2) if high > low else 1.0 for v in values]


def _plots(scan: ScanFiles) -> list[tuple[str, Markup]]:
    named = {"lie": "lie", "p-value": "p_value", **scan.scores}
    return [(name, Markup(histogram_svg(*scan.histograms[column]))) for name, column in named.items()]


def _truth(scan: ScanFiles) -> dict[str, Any] | None:
    """Detection of each attack, where the truth was known."""
    truth = scan.summary.get("truth")
    if not isinstance(truth, dict):
        return None
    attacks = list(truth["actions"])
    lines = [
        (clean(name.removesuffix("_score").replace("_", "-"), 40), [f"{found[one]['auroc']:.3f}" for one in attacks])
        for name, found in truth["detection"].items()
    ]
    done = [(clean(one, 40), [truth["actions"][one].get(name, 0) for name in ACTIONS]) for one in attacks]
    done.append(("honest", [truth["honest"].get(name, 0) for name in ACTIONS]))
    repair = [
        (clean(one, 40) or "honest", percent(rate["value"]), rate["n"]) for one, rate in truth.get("repair", {}).items()
    ]
    return {"attacks": [clean(one, 40) for one in attacks], "lines": lines, "done": done, "repair": repair}


def _settings(scan: ScanFiles) -> list[tuple[str, str]]:
    values = {**scan.settings, "reference pairs": scan.summary.get("reference")}
    return [
        (clean(name, 60).replace("_", " "), clean(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False), 300))
        for name, v in values.items()
        if name != "limits"
    ]
