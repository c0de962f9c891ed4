"""The page: whole, self-contained, and deaf to what the captions tell it to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet as pq

from otcclip.errors import UserError
from otcclip.report import write_report
from otcclip.report.images import Album, changed_box, decode

Make = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
Picture = Callable[..., bytes]
OUR_TAGS = set(
    re.findall(
        r"\w+",
        """html head meta title link style body header main section footer h1 h2 h3 h4 p span b small div
        figure figcaption img ul li table thead tbody tr th td i u details summary dl dt dd
        svg defs g path use text clippath rect""",
    )
)


class Page(HTMLParser):
    """What a browser would find: every tag, every attribute, the visible text, and whether tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u202f", " ").split())


def read(run: Path) -> tuple[str, Page]:
    text = write_report(run).read_text(encoding="utf-8")
    return text, Page(text)


def section(text: str, heading: str) -> str:
    start = text.index(f"<h2>{heading}")
    return text[start : text.find("<h2>", start + 4)]


HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(2)>' onload='x {{7*7}} </style>\x1b[31m\x00\u202e"


def hostile_run(make_run: Make, a_result: Row) -> Path:
    """Every text a stranger could have written says the worst it can."""

    def edit(kind: str, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, str) and name not in ("phase", "action", "key"):
                row[name] = HOSTILE + value if name != "attack" or value else value

    folder_name = HOSTILE.replace("/", "").replace("\x00", "")
    attacks = {HOSTILE + "badnets": {"asr": 0.9, "n": 100}}
    rows = [a_result(d, attacks=attacks, clean_asr={HOSTILE: 0.1}) for d in ("clip", folder_name, "otcclip")]
    rows = [r | {"poison_kept": {HOSTILE: 3}, "poison_total": {HOSTILE: 9}} for r in rows]
    settings = {HOSTILE: HOSTILE, "list": [HOSTILE], "nested": {HOSTILE: [HOSTILE, {}]}}
    settings |= {"versions": {HOSTILE: HOSTILE}, "licences": {HOSTILE: HOSTILE}}
    return make_run(name=folder_name, rows=rows, edit=edit, settings=settings)


def test_hostile_text_stays_text(make_run: Make, a_result: Row) -> None:
    text, page = read(hostile_run(make_run, a_result))
    assert set(page.tags) <= OUR_TAGS, set(page.tags) - OUR_TAGS
    assert page.open == []
    for tag, name, value in page.attributes:
        assert not name.startswith("on") and name not in ("srcdoc", "action", "formaction", "background"), (
            tag,
            name,
        )
        if name in ("src", "href", "xlink:href"):
            assert re.match(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+$|data:,$|#[\w-]+$", value), value[:80]
        if name == "style":
            assert "alert" not in value
    assert text.count("<style>") == text.count("</style>") == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text  # shown, as the text it is


def test_the_page_stands_alone(make_run: Make) -> None:
    text, page = read(make_run("clip", "otcclip", "roclip"))
    assert "script" not in page.tags and "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    outside = {v for _, n, v in page.attributes if n in ("src", "href", "xlink:href") and "//" in v[:12]}
    assert not outside
    assert len(text) < 2_000_000


def test_everything_is_there(make_run: Make) -> None:
    text, page = read(make_run("clip", "otcclip", "roclip"))
    assert "Undefended, a patch of 6×6 pixels turns 96.0 % of the test images into “banana”" in page.text
    results = section(text, "Results")
    assert results.count("<tr>") == 4 and "95.0–97.0" in results
    curves = section(text, "Over the epochs")
    for title in (
        "Zero-shot top-1",
        "ASR of badnets",
        "ASR of targeted",
        "What otcclip kept",
        "What roclip kept",
    ):
        assert f"<h3>{title}</h3>" in curves
    assert "What clip kept" not in curves and "warm-up of otcclip (2 epochs)" in curves
    images = section(text, "Test images under attack")
    sample = images[: images.index("Others that fooled")]
    assert sample.count('<figure class="tile">') == 18
    assert "18 of 30, drawn by a hash" in images and "aimed at goal 31" in images
    distrusted = section(text, "Training pairs the defence distrusted")
    assert "Poison caught" in distrusted and "first words 3" in distrusted and "mended 3" in distrusted
    assert "4 copies" in distrusted and distrusted.index("otcclip") < distrusted.index("roclip")
    assert "Show 2 more" in distrusted
    through = section(text, "Poison that got through")
    assert "poison: badnets" in through and "trained on as it came" in through
    assert "hold out" in page.text and "2.14.1" in page.text and "OpenMoji" in page.text


def test_failures_are_shown_beyond_the_sample(make_run: Make) -> None:
    text, _ = read(make_run("clip", "roclip", images=60))
    images = section(text, "Test images under attack")
    tally = re.search(r"Others that fooled a defence <span class=\"tally\">(\d+)", images)
    assert tally and int(tally[1]) > 0


def test_the_example_does_not_flatter_a_defence_that_lost(make_run: Make, a_result: Row, a_rate: Any) -> None:
    """Of the undefended model's failures the first is shown, not the first that the defence got right."""

    def header(name: str, asr: float) -> str:
        rows = [a_result(d, attacks={"badnets": a_rate(a, 1000)}) for d, a in (("clip", 0.96), ("otcclip", asr))]
        return read(make_run(name=name, rows=rows))[0].split("<main>")[0].split('class="example"')[1]

    won, lost = header("won", 0.001), header("lost", 0.9)
    assert 'class="right"' in won
    assert 'class="right"' not in lost


def test_no_poison_got_through_is_said(make_run: Make) -> None:
    def edit(kind: str, row: dict[str, Any]) -> None:
        if kind == "pairs" and row["action"] == "keep":
            row["action"] = "hold-back"

    text, _ = read(make_run(edit=edit, images=2))
    assert "<b>otcclip</b>: none." in section(text, "Poison that got through")


def test_a_run_without_ground_truth_does_not_claim_any(make_run: Make, a_result: Row) -> None:
    def edit(kind: str, row: dict[str, Any]) -> None:
        if kind == "pairs":
            row["attack"] = ""

    run = make_run(rows=[a_result("otcclip", poison_kept={}, poison_total={})], edit=edit, images=2)
    (run / "poison.parquet").unlink()
    _, page = read(run)
    assert "not known; this run has no ground truth" in page.text
    assert "Honest pairs" not in page.text and "Pairs given another caption" in page.text


def test_a_defence_that_distrusts_none_and_one_without_gallery_rows(make_run: Make) -> None:
    run = make_run("otcclip", images=0)
    for name in ("pairs", "gallery"):
        path = run / "otcclip" / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    _, page = read(run)
    assert "It distrusted none." in page.text and "Test images under attack" not in page.text


def test_only_clip_and_no_settings(make_run: Make) -> None:
    text, _ = read(make_run("clip", images=2, settings={}))
    assert "Training pairs" not in text and "Poison that got through" not in text
    assert "Licences" in text and "OpenMoji" not in text


@pytest.mark.parametrize("given", [["CC0"], {"mine": "CC0"}])
def test_licences_given_by_the_run_win(make_run: Make, given: object) -> None:
    _, page = read(make_run("clip", images=1, settings={"corpus": "emoji", "licences": given}))
    assert "CC0" in page.text and "OpenMoji" not in page.text


def test_the_same_files_give_the_same_page(make_run: Make) -> None:
    run = make_run(images=4)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_full_disk_leaves_the_old_report_whole(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(images=2)
    before = write_report(run).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert sorted(p.name for p in run.iterdir() if "tmp" in p.name) == []


def test_a_broken_image_is_a_blank_tile_not_a_lost_report(make_run: Make) -> None:
    def edit(kind: str, row: dict[str, Any]) -> None:
        if kind == "gallery":
            row["image"] = [b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\nrubbish", b"", row["image"][:60]][
                int(row["key"][5:]) % 4
            ]

    text, _ = read(make_run("clip", images=8, edit=edit))
    assert text.count('class="blank"') == 12 and "onload=" not in text


def test_large_images_are_shrunk_and_the_budget_holds(picture: Picture) -> None:
    big, small = picture(1, 300), picture(2, 24)
    album = Album(budget=40_000)
    uri = album.uri(big)
    assert uri is not None and uri.startswith("data:image/webp;base64,") and len(uri) < len(big) / 4
    assert (album.uri(small) or "").startswith("data:image/png;base64,")
    assert [album.uri(big) for _ in range(4)][-1] is None and album.omitted > 0
    assert decode(b"GIF89a") is None


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch, picture: Picture) -> None:
    monkeypatch.setattr("otcclip.report.images._MAX_PIXELS", 24 * 24 - 1)
    assert decode(picture(1)) is None and Album().uri(picture(1)) is None


def test_changed_box_measures_the_trigger(picture: Picture) -> None:
    plain = picture(3)
    assert changed_box(plain, picture(3, patch=7)) == (7, 7, 24, 24)
    assert changed_box(plain, plain) is None
    assert changed_box(plain, picture(3, 25)) is None
