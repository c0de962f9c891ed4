"""Numbers and strangers' text, as a person reads them. Nothing here knows of HTML or the terminal."""

from __future__ import annotations

import math
import re

NARROW = "\u202f"  # narrow no-break space: "96 %" and "7 540" never break across lines
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
# C0, C1 and the bidirectional overrides that make text read other than it is. U+200D stays: emoji use it.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]+")


def clean(text: object, limit: int = 240) -> str:
    """`text` on one line, safe to print: no ANSI escapes, control or bidi characters, at most `limit` long.

    Markup is left alone: whoever writes HTML escapes it (the template engine does).
    """
    line = _CONTROL.sub(" ", _ANSI.sub("", "" if text is None else str(text)))
    line = " ".join(line.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0…1 as "96.4 %"; never rounds something to nothing, nor short of all to all."""
    if share is None:
        return "–"
    value, step = 100 * share, 10.0**-digits
    if 0 < value < step / 2:
        return f"<{step:.{digits}f}{NARROW}%"
    if 100 - step / 2 <= value < 100:
        return f">{100 - step:.{digits}f}{NARROW}%"
    text = f"{value:.{digits}f}"
    if digits and float(text) in (0.0, 100.0):
        text = text.split(".")[0]
    return f"{text}{NARROW}%"


def interval(low: float | None, high: float | None) -> str:
    """A 95 % interval as "94.1–97.0 %", or "" where the file has none."""
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f}–{100 * high:.1f}{NARROW}%"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def of(part: int | None, whole: int | None) -> str:
    """ "7,540 of 8,974"; the whole is left out where it is not known."""
    return count(part) if part is None or whole is None else f"{part:,} of {whole:,}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f}{NARROW}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 90:
        return f"{minutes}{NARROW}min {rest:02d}{NARROW}s"
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"


def memory(size: float | None) -> str:
    if size is None:
        return "–"
    mebibytes = size / 2**20
    return f"{mebibytes:,.0f}{NARROW}MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.2f}{NARROW}GiB"


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate over `n` trials (Wilson, 1927)."""
    if n <= 0:
        return 0.0, 1.0
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
