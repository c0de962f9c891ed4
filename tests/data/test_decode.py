"""Decoding what an enemy wrote: allow-list, caps, and a reason for everything refused."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from otcclip.data.decode import (
    REASONS,
    BadPair,
    Limits,
    decode_caption,
    decode_image,
    printable,
)
from otcclip.data.metadata import decode_metadata


def encode(array: np.ndarray, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is `width` x `height`."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


RED = np.full((32, 32, 3), (200, 10, 10), np.uint8)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_three_formats_decode(kind: str) -> None:
    out = decode_image(encode(RED, kind), 16)
    assert out.shape == (16, 16, 3)
    assert out.dtype == np.uint8
    assert np.abs(out.astype(int) - (200, 10, 10)).max() <= 6  # lossy formats


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "ico", "ppm"])
def test_other_formats_are_refused_although_pil_reads_them(kind: str) -> None:
    with pytest.raises(BadPair, match="not an allowed format"):
        decode_image(encode(RED, kind), 16)


def test_resizing_is_bicubic_with_antialias() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_image(encode(noise), 48), expected)


def test_the_stored_size_comes_back_exactly() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    assert np.array_equal(decode_image(encode(noise), 64), noise)


@pytest.mark.parametrize("shape", [(20, 60), (60, 20)])
def test_the_centre_is_cropped_not_squeezed(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    middle = (slice(None), slice(20, 40)) if shape[1] == 60 else (slice(20, 40), slice(None))
    image[middle] = 255
    assert decode_image(encode(image), 20).min() == 255


def test_transparency_is_laid_on_white() -> None:
    clear = np.zeros((8, 8, 4), np.uint8)
    half = np.full((8, 8, 4), (0, 0, 0, 128), np.uint8)
    assert (decode_image(encode(clear), 8) == 255).all()
    assert np.abs(decode_image(encode(half), 8).astype(int) - 127).max() <= 1


def test_a_palette_with_transparency_and_sixteen_bit_grey() -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0])
    buffer = io.BytesIO()
    palette.save(buffer, "png", transparency=0)
    assert (decode_image(buffer.getvalue(), 8) == 255).all()
    grey = np.full((8, 8), 0x8000, np.uint16)
    assert (decode_image(encode(grey), 8) == 0x80).all()


def test_623_megapixels_are_refused_from_the_header() -> None:
    with pytest.raises(BadPair, match="too many pixels"):
        decode_image(png_header(24_960, 24_960), 48)


def test_the_cap_is_ours_and_not_pils() -> None:
    """200 MP is past PIL's own guard: with our cap raised, only the missing pixels are wrong with it."""
    with pytest.raises(BadPair, match="broken image"):
        decode_image(png_header(20_000, 10_000), 48, Limits(pixels=300_000_000))
    with pytest.raises(BadPair, match="too many pixels"):
        decode_image(encode(RED), 16, Limits(pixels=1023))
    decode_image(encode(RED), 16, Limits(pixels=1024))


def test_a_slivers_enlargement_is_within_the_cap_of_pixels() -> None:
    """40,000 x 1 at 64 px is 164 megapixels before it is cropped; of the widest that is taken it is just the cap."""
    with pytest.raises(BadPair, match="too many pixels"):
        decode_image(encode(np.zeros((1, 40_000, 3), np.uint8)), 64)
    limits = Limits(pixels=8 * 8 * 30)
    assert decode_image(encode(np.zeros((1, 30, 3), np.uint8)), 8, limits).shape == (8, 8, 3)
    with pytest.raises(BadPair, match="too many pixels"):
        decode_image(encode(np.zeros((1, 31, 3), np.uint8)), 8, limits)


def test_a_sliver_within_the_cap_is_refused_before_it_is_enlarged() -> None:
    with pytest.raises(BadPair, match="too many pixels"):
        decode_image(png_header(60_000_000, 1), 48)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_cut_off_image_is_broken(kind: str, keep: float) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    data = encode(noise, kind)
    with pytest.raises(BadPair, match="broken image"):
        decode_image(data[: int(len(data) * keep)], 16)


def test_too_many_bytes() -> None:
    with pytest.raises(BadPair, match="member too large"):
        decode_image(encode(RED), 16, Limits(member_bytes=10))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["png", "jpeg", "webp"]), st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_crafted_bytes_end_in_an_image_or_a_reason(kind: str, at: int, junk: bytes) -> None:
    data = encode(RED, kind)
    crafted = data[:at] + junk + data[at + len(junk) :]
    try:
        assert decode_image(crafted, 8).shape == (8, 8, 3)
    except BadPair as bad:
        assert bad.reason in REASONS


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("unpickled",))


def test_a_pickle_is_never_loaded() -> None:
    data = pickle.dumps(Bomb())
    for decode in (lambda b: decode_image(b, 8), decode_metadata):
        with pytest.raises(BadPair):
            decode(data)


def test_captions() -> None:
    assert decode_caption("\ufeff  polar bear | Bär\n".encode()) == "polar bear | Bär"
    for data, reason in [
        (b"", "empty caption"),
        (b" \n\t", "empty caption"),
        (b"\x1b[31m\x1b[0m\x07", "empty caption"),
        (b"\xff\xfe\x00", "caption is not UTF-8"),
        (b"a" * 4097, "caption too long"),
        (b"a" * 10_000_000, "caption too long"),
    ]:
        with pytest.raises(BadPair) as bad:
            decode_caption(data)
        assert bad.value.reason == reason
    assert len(decode_caption(("ä" * 4096).encode())) == 4096


def test_printable_strips_what_a_terminal_would_obey() -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07red\x1b[31m bear\x9b1m\x1b(0\r\n\tnext\x00\x7f\u202eevil\x1b"
    assert printable(hostile) == "red bear nextevil"
    assert printable("\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\") == "click"
    assert printable("plain | Bär, 🐻") == "plain | Bär, 🐻"


@given(st.text())
def test_printable_leaves_no_control_character(text: str) -> None:
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in printable(text))
