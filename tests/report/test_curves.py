from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from otcclip.report.curves import colour_of, panels
from otcclip.report.files import load_run

Make = Callable[..., Path]


def test_a_panel_a_measure_with_every_defence(make_run: Make) -> None:
    drawn = panels(load_run(make_run("clip", "otcclip", "roclip", images=2)))
    titles = [p.title for p in drawn]
    assert titles == [
        "Zero-shot top-1",
        "ASR of badnets",
        "ASR of targeted",
        "What otcclip kept",
        "What roclip kept",
    ]
    assert [s.label for s in drawn[0].legend] == ["clip", "otcclip", "roclip"]
    assert drawn[0].legend[0].x == [0, 1, 2, 4, 5]  # epoch 3 was not evaluated
    kept = drawn[3].legend
    assert [s.label for s in kept] == ["all pairs kept", "poison kept: badnets", "poison kept: targeted"]
    assert kept[0].x == [2, 3, 4, 5] and kept[0].y[-1] == 0.805
    assert "trust AUROC for badnets 0.90 and repair precision 70.0" in drawn[3].note
    assert kept[1].y[-1] == 5 / 90 and kept[2].y == [0.0] * 4


def test_drawings_are_small_themed_and_hold_no_names(make_run: Make) -> None:
    for panel in panels(load_run(make_run("clip", "otcclip", images=2))):
        ElementTree.fromstring(panel.svg.replace("xlink:href", "href"))
        assert len(panel.svg) < 20_000
        assert "var(--c" in panel.svg and "#0a00" not in panel.svg
        assert "<style" not in panel.svg and "badnets" not in panel.svg and "otcclip" not in panel.svg


def test_no_two_drawings_share_an_id(make_run: Make) -> None:
    drawn = panels(load_run(make_run("clip", "otcclip", images=2)))
    ids = [i for p in drawn for i in set(re.findall(r'\bid="([^"]+)"', p.svg))]
    assert len(ids) == len(set(ids)) > 0


def test_colours_are_a_defence_s_own(make_run: Make) -> None:
    run = load_run(make_run("roclip", "otcclip", "safeclip", "clip", images=1))
    assert [colour_of(run, d.name) for d in run.defenses] == [2, 1, 3, 0]


def test_only_warm_up_is_shaded(make_run: Make, a_result: Callable[..., dict[str, Any]]) -> None:
    run = load_run(make_run("clip", images=1))
    assert all("--shade" not in p.svg and not p.note for p in panels(run))


def test_a_run_of_one_epoch_still_shows_a_point(make_run: Make, a_result: Callable[..., dict[str, Any]]) -> None:
    drawn = panels(load_run(make_run(rows=[a_result("clip", epochs=1)], images=1)))
    assert "<use" in drawn[0].svg


def test_a_run_never_evaluated_has_no_curves(make_run: Make, a_result: Callable[..., dict[str, Any]]) -> None:
    assert panels(load_run(make_run(rows=[a_result("clip", epochs=0)], images=1))) == []
