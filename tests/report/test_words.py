from __future__ import annotations

import pytest

from otcclip.report.words import clean, duration, interval, listed, memory, of, percent, wilson


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.964, "96.4 %"),
        (0.0001, "<0.1 %"),
        (0.0005, "0.1 %"),
        (0.9999, ">99.9 %"),
        (None, "–"),
    ],
)
def test_percent_never_rounds_to_nothing_or_to_all(share: float | None, text: str) -> None:
    assert percent(share).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("\x1b]0;title\x07x", "x"),
        ("a\x00b\tc\nd", "a b c d"),
        ("evil\u202etxt.exe", "evil txt.exe"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        (None, ""),
    ],
)
def test_clean_strips_what_a_terminal_would_obey(raw: str | None, safe: str) -> None:
    assert clean(raw) == safe


def test_clean_shortens() -> None:
    assert clean("x" * 300, 10) == "x" * 9 + "…"


def test_wilson_matches_the_published_example() -> None:
    """0 of 16 is at most 19.4 %, 15 of 16 at least 71.7 % (95 %)."""
    assert wilson(0.0, 16) == pytest.approx((0.0, 0.1936), abs=1e-4)
    assert wilson(15 / 16, 16) == pytest.approx((0.7167, 0.9889), abs=1e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)


def test_quantities_read_as_people_write_them() -> None:
    plain = [s.replace("\u202f", " ") for s in (duration(45), duration(381.2), duration(7300), duration(None))]
    assert plain == ["45 s", "6 min 21 s", "2 h 01 min", "–"]
    assert [m.replace("\u202f", " ") for m in (memory(2**29), memory(3 * 2**30), memory(None))] == [
        "512 MiB",
        "3.00 GiB",
        "–",
    ]
    assert of(7540, 8974) == "7,540 of 8,974" and of(3, None) == "3" and of(None, 4) == "–"
    assert interval(None, 0.1) == "" and interval(0.1, 0.2).startswith("10.0–20.0")
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
