"""JSON objects whose fields are checked as they are read; whatever is wrong names the file and the field."""

from __future__ import annotations

import json
import math
from typing import Any

from otcclip.errors import UserError
from otcclip.report.records import Rate
from otcclip.report.words import clean, wilson


class Fields:
    """An object of a JSON file, its fields checked as they are read; `where` names the file in errors."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {type(value).__name__}")
        self.where, self.value = clean(where, 400), value

    def fail(self, name: str, expected: str) -> UserError:
        found = clean(json.dumps(self.value[name]), 60) if name in self.value else "nothing"
        return UserError(f"{self.where}: field '{clean(name, 60)}': expected {expected}, found {found}")

    def text(self, name: str) -> str:
        value = self.value.get(name)
        if not isinstance(value, str) or not value:
            raise self.fail(name, "a non-empty string")
        return value

    def number(self, name: str) -> float | None:
        """A finite number; `None` where it is absent, null or not finite (a diverged loss is NaN)."""
        value = self.value.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, "a number")
        try:
            return float(value) if math.isfinite(value) else None
        except OverflowError:  # JSON integers know no bounds
            raise self.fail(name, "a number of ordinary size") from None

    def share(self, name: str) -> float | None:
        value = self.number(name)
        if value is not None and not 0 <= value <= 1:
            raise self.fail(name, "a share between 0 and 1")
        return value

    def count(self, name: str) -> int | None:
        value = self.number(name)
        if value is not None and (value < 0 or value != int(value)):
            raise self.fail(name, "a count")
        return None if value is None else int(value)

    def need(self, name: str, value: Any) -> Any:
        if value is None:
            raise self.fail(name, "a value")
        return value

    def inner(self, name: str) -> Fields:
        """The object at `name`; an empty one where it is absent or null."""
        value = self.value.get(name)
        return Fields(f"{self.where}: field '{name}'", {} if value is None else value)

    def shares(self, name: str) -> dict[str, float]:
        inner = self.inner(name)
        return {k: v for k in inner.value if (v := inner.share(k)) is not None}

    def counts(self, name: str) -> dict[str, int]:
        inner = self.inner(name)
        return {k: v for k in inner.value if (v := inner.count(k)) is not None}

    def rates(self, name: str) -> dict[str, Rate]:
        inner = self.inner(name)
        return {key: _rate(inner.inner(key)) for key in inner.value}


def _rate(fields: Fields) -> Rate:
    asr = fields.need("asr", fields.share("asr"))
    n = fields.need("n", fields.count("n"))
    low, high = fields.share("low"), fields.share("high")
    if low is None or high is None:
        low, high = wilson(asr, n)
    return Rate(asr, n, low, high)
