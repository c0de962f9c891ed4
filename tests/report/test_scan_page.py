"""The page of a scan: what it says, what it escapes, that it pages 1e5 rows; and in a real browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from otcclip.errors import UserError
from otcclip.report.scan import write_scan_report
from otcclip.report.scan_files import histogram

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
SCRIPT = "</script><script>document.title='owned'</script>"
Make = Callable[..., Path]


def picture(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def make_scan(tmp_path: Path) -> Make:
    """A finished scan's folder of `n` rows, the first `pictures` of them with images and heat."""

    def make(n: int = 60, pictures: int = 12, **changed: Any) -> Path:
        folder = tmp_path / "scan"
        folder.mkdir()
        action = ["re-pair" if i % 10 == 0 else "drop" if i % 10 < 3 else "keep" for i in range(n)]
        caption = [SCRIPT if i == 0 else f"a thing number {i}" for i in range(n)]
        columns: dict[str, Any] = {
            "key": [f"pair-{i}" for i in range(n)],
            "caption": caption,
            "neighbour_ot_score": np.linspace(2, 0, n),
            "own_rank_score": np.linspace(1, 0, n),
            "gmm_score": pa.nulls(n, pa.float64()),
            "p_value": np.linspace(1, 0, n),
            "lie": np.linspace(1, 0, n),
            "copies": [2 if i == 1 else 1 for i in range(n)],
            "disputed": [i == 2 for i in range(n)],
            "doubtful_word": ["</script>banana" if i == 1 else None for i in range(n)],
            "best_caption": ["what it shows"] * n,
            "action": action,
            "new_caption": ["what it shows" if a == "re-pair" else None for a in action],
        }
        pq.write_table(pa.table(columns | changed), folder / "scan.parquet")
        heat = [i / 16 for i in range(16)]
        rows = [
            {
                "key": f"pair-{i}",
                "image": picture(i),
                "own_heat": heat,
                "best_heat": heat[::-1],
                "attack": "badnets" if i == 0 else None,
            }
            for i in range(pictures)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "gallery.parquet")
        names = ("neighbour-ot", "own-rank", "gmm")
        summary = {
            "pairs": n,
            "reference": n,
            "actions": {name: action.count(name) for name in ("keep", "re-pair", "drop")},
            "skipped": {"broken image": 3},
            "failed": {"00007": f"00007.tar: truncated {SCRIPT}"},
            "detectors": {d: {"column": f"{d.replace('-', '_')}_score", "comparable": True} for d in names},
            "truth": {
                "actions": {"badnets": {"keep": 0, "re-pair": 1, "drop": 0}},
                "honest": {"keep": 9, "re-pair": 0, "drop": 2},
                "detection": {"caption_fdr_score": {"badnets": {"auroc": 0.9876}}},
                "repair": {"badnets": {"value": 0.5, "n": 2, "low": 0.1, "high": 0.9}},
            },
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "scan.json").write_text(json.dumps({"source": ["x"], "rule": {"alpha": 0.02}}))
        return folder

    return make


def data_of(page: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)</script>', page)
    assert packed is not None
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return found


def test_why_pairs_are_not_kept(make_scan: Make) -> None:
    """Others say something else of seven, three of which are not kept; a witness disputes what one says."""
    folder = make_scan(claim_left_out_score=np.where(np.arange(60) < 7, 0.9, 0.01))
    text = re.sub(r"<[^>]*>|\s+", " ", write_scan_report(folder).read_text("utf-8"))
    text = re.sub(r"\s+", " ", text)
    assert "what others say of their images leads to other captions 3" in text
    assert "what it says is said unusually often, and a witness disputes it 1" in text


def test_what_it_says(make_scan: Make) -> None:
    page = write_scan_report(make_scan()).read_text("utf-8")
    assert "Of 60 pairs, 18 carry captions that nothing bears out." in page
    assert "broken image" in page and "0.988" in page and "1 shards could not be read" in page
    data = data_of(page)
    assert data["key"][0] == "pair-0" and data["scores"]["lie"][0] == 1
    assert list(data["scores"]) == ["lie", "p-value", "neighbour-ot", "own-rank"]  # gmm is null here
    uri, own, best, attack = data["picture"][0]
    assert uri.startswith("data:image/") and own[0] == 0 and own[-1] == 1 and best[0] == 1 and attack == "badnets"
    assert data["picture"][12] is None
    assert data["word"][:3] == [None, "</script>banana", None] and "a word is used that most use" in page


def test_a_caption_is_data_and_only_the_pages_own_script_may_run(make_scan: Make) -> None:
    page = write_scan_report(make_scan()).read_text("utf-8")
    assert page.count("<script") == 2 and "owned" not in re.sub(r"&lt;.*?&gt;", "", page.split("could not be read")[0])
    assert data_of(page)["caption"][0] == SCRIPT
    script = re.search(r"<script>(.*)</script>\n</body>", page, re.DOTALL)
    allowed = re.search(r"script-src &#39;sha256-([^&]*)&#39;|script-src 'sha256-([^']*)'", page)
    assert script is not None and allowed is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert digest in (allowed[1], allowed[2])
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_hundred_thousand_rows_are_one_light_file(make_scan: Make) -> None:
    page = write_scan_report(make_scan(n=110_000))
    data = data_of(page.read_text("utf-8"))
    assert len(data["key"]) == 100_000 and page.stat().st_size < 8_000_000
    assert "The list holds the 100,000 most suspicious of 110,000 pairs" in page.read_text("utf-8")


def test_histograms_count_every_pair_once() -> None:
    values = np.concatenate([np.linspace(0, 1, 997), [5, 50, 500]])
    action = np.array(["keep", "drop"] * 500, object)
    edges, counts = histogram(values, action)
    assert sum(int(c.sum()) for c in counts.values()) == 1000 and len(edges) == 49
    assert counts["keep"].sum() == 500 and edges[-1] < 500
    flat, one = histogram(np.zeros(4), np.array(["keep"] * 4, object))
    assert one["keep"].sum() == 4 and flat[-1] > flat[0]


def test_a_broken_folder_is_one_line(make_scan: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json: not found"):
        write_scan_report(tmp_path)
    folder = make_scan(action=["maybe"] * 60)
    with pytest.raises(UserError, match="action 'maybe' is none of keep, re-pair, drop"):
        write_scan_report(folder)
    (folder / "scan.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        write_scan_report(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_the_list_is_drawn_and_no_caption_runs(make_scan: Make, tmp_path: Path) -> None:
    page = write_scan_report(make_scan(n=5000))
    shot = Path(os.environ.get("SCREENSHOTS", tmp_path)) / "scan.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=6000"]
    dom = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90, check=True
    )
    assert "CONSOLE" not in dom.stderr
    assert '<html lang="en" data-ready="yes">' in dom.stdout and "owned</title>" not in dom.stdout
    assert dom.stdout.count('<figure class="tile') == 12 and "page 1 of 1, 12 pairs" in dom.stdout
    assert "&lt;script&gt;document.title" in dom.stdout and dom.stdout.count('class="heat"') == 24
    done = [*command, "--window-size=1100,2400", f"--screenshot={shot}", page.as_uri()]
    subprocess.run(done, capture_output=True, timeout=90, check=True)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (2400, 1100, 3)
    assert all(band.std() > 3 for band in np.array_split(pixels.astype(float), 6))
