"""The headline says what the numbers say, and says when they say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from otcclip.report.files import load_run
from otcclip.report.story import Story, tell

Make = Callable[..., Path]
Row = Callable[..., dict[str, Any]]
RateOf = Callable[[float, int], dict[str, float]]


def lines(story: Story) -> list[str]:
    return ["".join(piece.text for piece in s).replace("\u202f", " ") for s in story.sentences]


def test_a_defence_that_won(make_run: Make) -> None:
    story = tell(load_run(make_run("clip", "otcclip")))
    assert lines(story) == [
        "Undefended, a patch of 6×6 pixels turns 96.0 % of the test images into “banana”. With otcclip: 0.1 %.",
        "Undefended, 16 of 16 targeted images are read as the attacker’s class. With otcclip: 0 of 16.",
        "Top-1 accuracy with otcclip: 50.4 % against 47.1 % undefended (3.3 points more).",
    ]
    assert story.warnings == []
    assert [p.tone for p in story.sentences[0] if p.tone] == ["bad", "good"]


@pytest.mark.parametrize(
    ("undefended", "defended", "top1", "says"),
    [
        (0.96, 0.9, 0.5, "the defence lost"),
        (0.96, 0.1, 0.5, "weakened, not stopped"),
        (0.96, 0.0, 0.02, "it learned little"),
        (0.4, 0.0, 0.5, "Too weak an attack"),
    ],
)
def test_the_headline_is_honest(
    make_run: Make, a_result: Row, a_rate: RateOf, undefended: float, defended: float, top1: float, says: str
) -> None:
    rows = [
        a_result("clip", attacks={"badnets": a_rate(undefended, 1000)}),
        a_result("otcclip", attacks={"badnets": a_rate(defended, 1000)}, top1=top1),
    ]
    story = tell(load_run(make_run(rows=rows, images=4)))
    assert says in lines(story)[0]
    assert "good" not in [p.tone for p in story.sentences[0]]
    warned = " ".join(story.warnings)
    assert ("is not a test" in warned) == (undefended < 0.8)
    assert ("hard to fool" in warned) == (top1 < 0.1)


def test_nothing_to_compare_with(make_run: Make) -> None:
    story = tell(load_run(make_run("otcclip", images=4)))
    assert lines(story)[0].startswith("With otcclip, a patch of 6×6 pixels turns 0.1 % of the test images")
    assert lines(story)[1].startswith("With otcclip, 0 of 16 targeted images are read as")
    assert lines(story)[2] == "Top-1 accuracy with otcclip: 50.4 %."
    assert "no undefended run" in story.warnings[0]


def test_undefended_alone(make_run: Make) -> None:
    story = tell(load_run(make_run("clip", images=4)))
    assert lines(story)[-1] == "Top-1 accuracy undefended: 47.1 %."
    assert story.warnings == ["No defence was run."]


def test_no_attack_at_all(make_run: Make, a_result: Row) -> None:
    rows = [a_result(d, attacks={}, poison_kept={}, poison_total={}) for d in ("clip", "otcclip")]
    assert len(tell(load_run(make_run(rows=rows, images=0))).sentences) == 1


def test_an_attack_without_images_is_named(make_run: Make, a_result: Row, a_rate: RateOf) -> None:
    rows = [a_result("clip", attacks={"wanet": a_rate(0.9, 100)})]
    story = tell(load_run(make_run(rows=rows, images=1)))
    assert lines(story)[0] == (
        "Undefended, the trigger of wanet turns 90.0 % of the test images into the attacker’s class."
    )


def test_a_pattern_over_the_whole_image(make_run: Make) -> None:
    def edit(kind: str, row: dict[str, Any]) -> None:
        if kind == "gallery" and row["attack"] == "badnets":
            row["clean_image"] = swapped.setdefault(row["key"], row["image"])
            row["image"] = first.setdefault("image", row["image"])

    first: dict[str, bytes] = {}
    swapped: dict[str, bytes] = {}
    story = tell(load_run(make_run("clip", images=4, edit=edit)))
    assert "a pattern over the whole image turns" in lines(story)[0]


def test_several_seeds_are_said(make_run: Make, a_result: Row) -> None:
    rows = [a_result(d, seed=s) for d in ("clip", "otcclip") for s in (0, 1)]
    assert "seed 0" in tell(load_run(make_run(rows=rows, images=2))).warnings[-1]
