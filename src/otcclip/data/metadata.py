"""A pair's json member: read as if an enemy had written it, and written back with what it held.

Readers get a flat view, `strings_of`. The object itself, numbers, lists and all, is carried by a `Pair` only where its
reader was asked for it (`Pair.fields`): it may be a thousand times what anybody looks at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from otcclip.data.decode import DEFAULT_LIMITS, BadPair, Limits
from otcclip.data.pairs import Pair

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def parse_metadata(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """A JSON object as Python's parser gives it: of a key given twice the last value, NaN and 1e999 as floats.

    Raises:
        BadPair: not a JSON object, one with an over-long label or source, or nested deeper than the cap (checked before
            parsing: the parser recurses).
    """
    try:
        # As the parser would decode it: in UTF-16, say, a character may hold the byte of a quote and hide brackets.
        text = data.decode(json.detect_encoding(data), "surrogatepass")
    except UnicodeDecodeError as error:
        raise BadPair("broken metadata") from error
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > limits.json_depth:
        raise BadPair("metadata too deep")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPair("broken metadata") from error
    if not isinstance(value, dict):
        raise BadPair("broken metadata")
    said = strings_of({name: value[name] for name in ("label", "source") if name in value})
    if any(len(field) > limits.caption_chars for field in said.values()):
        raise BadPair("caption too long")
    return value


def strings_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """The scalar fields as strings; nested values are dropped, null is left out."""
    return {_text(k): _text(v) for k, v in fields.items() if isinstance(v, str | int | float)}


def decode_metadata(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, str]:
    """A JSON object's scalar fields as strings; nested values are dropped, null is left out.

    Raises:
        BadPair: as `parse_metadata`.
    """
    return strings_of(parse_metadata(data, limits))


def writable(value: Any) -> Any:
    """A copy of a parsed value that any reader of JSON takes: half a surrogate pair becomes `?`, and a number that JSON
    has no word for (NaN, 1e999) its name as a string. Its depth is capped when it is parsed."""
    if isinstance(value, dict):
        return {_text(k): writable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [writable(v) for v in value]
    if isinstance(value, str) or (isinstance(value, float) and not math.isfinite(value)):
        return _text(value)
    return value


def fields_of(pair: Pair) -> dict[str, Any]:
    """What a pair's json member is to hold: its metadata and label, in the types that they came in where it carries
    them; and what has no string, such as lists, as it came. A value that is not what it was is written as its string.
    """
    strings = dict(pair.metadata) | ({} if pair.label is None else {"label": pair.label})
    came = strings_of(pair.fields)
    # A field in neither view is null, a list or an object; one in `came` alone was taken out, as `__key__` is.
    return strings | {k: v for k, v in pair.fields.items() if came.get(k) == strings.get(k)}


def _text(value: str | int | float) -> str:
    """As a string that can be written as UTF-8: JSON may hold half a surrogate pair."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
