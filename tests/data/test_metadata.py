"""A pair's json member: a flat view for readers, and what it held for whoever writes it again."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otcclip.curation.units import Item
from otcclip.curation.writers import Mended, WebDatasetWriter
from otcclip.data import Pair, Skipped, read_shard, write_shard
from otcclip.data.decode import BadPair
from otcclip.data.metadata import decode_metadata, fields_of, parse_metadata, strings_of, writable

DATACOMP = {
    "uid": "0123456789abcdef" * 2,
    "face_bboxes": [[0.25, 0.5, 0.75, 1e-7], []],
    "clip_b32_similarity_score": 0.2861328125,
    "original_width": 640,
    "big": 2**70,
    "zero": -0.0,
    "nsfw": False,
    "url": None,
    "exif": {"Make": "Bär \U0001f43b", "nested": [{"a": [1, "2", None, True, {}]}]},
    "label": 3,
    "日本": "語",
}


def members(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            handle = archive.extractfile(member)
            assert handle is not None
            found[member.name] = handle.read()
    return found


def tar(path: Path, json_of: dict[str, bytes]) -> Path:
    """Pairs of no image worth decoding, with any bytes as their json."""
    with tarfile.open(path, "w") as archive:
        for key, data in json_of.items():
            for name, content in ((f"{key}.png", b"image"), (f"{key}.txt", b"a bear"), (f"{key}.json", data)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def rewritten(folder: Path, json_of: dict[str, bytes], original: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """What `repair --to wds` makes of each pair's json, and the reasons of those it does not take."""
    skipped: list[Skipped] = []
    found = read_shard(tar(folder / "in.tar", json_of), on_skip=skipped.append, fields=True)
    WebDatasetWriter(folder).write("out", (Mended(Item(pair, (0, 0)), "a cat", original) for pair in found))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    made = {name.removesuffix(".json"): data for name, data in members(folder / "out.tar").items() if "json" in name}
    return {key: json.loads(data, parse_constant=refuse) for key, data in made.items()}, [s.reason for s in skipped]


def same(a: object, b: object) -> bool:
    """Equal in value and type: to Python 1 == 1.0 == True."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def test_metadata() -> None:
    data = json.dumps({"label": "bear", "width": 3, "nested": {"a": [1]}, "none": None, "ok": True}).encode()
    assert decode_metadata(data) == {"label": "bear", "width": "3", "ok": "True"}


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 17 + b"1" + b"}" * 17])
def test_a_json_bomb_is_refused_before_parsing(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(BadPair, match="metadata too deep"):
        decode_metadata(data)


def test_brackets_inside_strings_are_no_depth() -> None:
    assert decode_metadata(json.dumps({"a": '[{"' * 50}).encode()) == {"a": '[{"' * 50}


@pytest.mark.parametrize("data", [b"", b"nope", b"[1]", b'"text"', b"{", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_broken_metadata(data: bytes) -> None:
    with pytest.raises(BadPair, match="broken metadata"):
        decode_metadata(data)


def test_half_a_surrogate_pair_can_be_written_afterwards() -> None:
    assert decode_metadata(b'{"label": "a\\ud800"}')["label"].encode("utf-8") == b"a?"


def test_an_over_long_label() -> None:
    with pytest.raises(BadPair, match="caption too long"):
        decode_metadata(json.dumps({"label": "x" * 5000}).encode())


def test_repaired_shards_keep_what_the_json_held(tmp_path: Path) -> None:
    kept, skipped = rewritten(tmp_path, {"a": json.dumps(DATACOMP).encode()})
    assert same(kept["a"], DATACOMP) and not skipped
    mended, _ = rewritten(tmp_path, {"a": json.dumps(DATACOMP, ensure_ascii=False).encode()}, original="a bear")
    assert same(mended["a"], DATACOMP | {"original_caption": "a bear"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["label", "uid", "x", ""]) | st.text(max_size=3), JSON, max_size=5))
def test_any_json_comes_back(fields: dict[str, Any]) -> None:
    parsed = parse_metadata(json.dumps(fields).encode())
    metadata = strings_of(parsed)
    pair = Pair("k", b"", "c", metadata.pop("label", None), metadata, writable(parsed))
    if not any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(fields, ensure_ascii=False)):
        assert same(fields_of(pair), fields)
    json.dumps(fields_of(pair), ensure_ascii=False).encode()


def test_what_was_changed_is_written_as_it_is_now() -> None:
    pair = Pair("k", b"", "c", "3", {"n": "1", "m": "2"}, {"label": 3, "n": 1, "m": 2, "gone": "x", "list": [1]})
    assert same(fields_of(pair), {"label": 3, "n": 1, "m": 2, "list": [1]})
    changed = replace(pair, label="bear", metadata={"n": "1", "m": "5", "list": "now text"})
    assert same(fields_of(changed), {"label": "bear", "n": 1, "m": "5", "list": "now text"})
    assert "label" not in fields_of(replace(pair, label=None))


def test_the_object_is_carried_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", {"a": json.dumps(DATACOMP).encode()})
    plain, whole = next(read_shard(path)), next(read_shard(path, fields=True))
    assert not plain.fields and same(whole.fields, DATACOMP)
    assert plain == replace(whole, fields={}) and plain.label == "3" and plain.metadata["nsfw"] == "False"
    assert "face_bboxes" not in plain.metadata
    write_shard(tmp_path / "1.tar", [whole])
    assert same(json.loads(members(tmp_path / "1.tar")["a.json"]), DATACOMP)


def test_a_key_that_is_no_name_and_a_claim_of_one(tmp_path: Path) -> None:
    json_of = {"im%2F0%2Epng": b'{"__key__": "im/0.png", "n": 1}', "same": b'{"__key__": "same", "n": 1}'}
    made, skipped = rewritten(tmp_path, json_of | {"thief": b'{"__key__": "same"}'})
    assert made == {"im%2F0%2Epng": {"__key__": "im/0.png", "n": 1}, "same": {"n": 1}}
    assert skipped == ["broken metadata"]


def hidden(depth: int) -> bytes:
    """Nesting between two characters that, in UTF-16, hold the byte of a quote: to the bytes it is in a string."""
    return ('{"Ģ": ' + "[" * depth + "]" * depth + ', "Ģ2": 1}').encode("utf-16")


HOSTILE: list[tuple[bytes, object]] = [
    (b'{"a": NaN, "b": [-Infinity, 1e999], "n": 1}', {"a": "nan", "b": ["-inf", "inf"], "n": 1}),
    (b'{"a": 1, "a": [2], "a": 3.5}', {"a": 3.5}),
    (b'{"a": ' + b"9" * 4300 + b"}", {"a": int("9" * 4300)}),
    (b'{"a": [' + b"9" * 4301 + b"]}", "broken metadata"),
    (b'{"a": ' + b"9" * 4301 + b"}", "broken metadata"),
    (b'{"a\\ud800": ["\\udc00"], "b": "\xed\xa0\x80"}', {"a?": ["?"], "b": "?"}),
    (b'{"\\ud800": "x", "\\udc00": [1]}', {"?": "x"}),
    (b'{"a": ' + b"[" * 15 + b"]" * 15 + b"}", json.loads(b'{"a": ' + b"[" * 15 + b"]" * 15 + b"}")),
    (b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}", "metadata too deep"),
    (hidden(500), "metadata too deep"),
    (hidden(90_000), "metadata too deep"),
    ('{"ä": 1}'.encode("utf-16"), {"ä": 1}),
    (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    (b'{"a": "\xff"}', "broken metadata"),
    (b'{"original_caption": ["mine"]}', {"original_caption": "a bear"}),
    (b'{"label": [1], "__key__": [2]}', {"label": [1], "__key__": [2]}),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_a_hostile_json_does_no_harm(case: int, tmp_path: Path) -> None:
    """It is skipped for a reason, or written as JSON that any parser takes; nothing ends the run."""
    data, expected = HOSTILE[case]
    made, skipped = rewritten(tmp_path, {"bad": data, "good": b'{"n": 1}'}, original="a bear")
    assert made.pop("good") == {"n": 1, "original_caption": "a bear"}
    if isinstance(expected, str):
        assert not made and skipped == [expected]
    else:
        assert isinstance(expected, dict) and not skipped
        assert same(made["bad"], expected | {"original_caption": "a bear"})
