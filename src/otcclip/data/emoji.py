"""Build the emoji corpus (CORPUS section 1): npm packages to shards, an index, a card and a default split.

    out/00000.tar ...   shards, about 1,000 pairs each, sorted by key
    out/index.parquet   key, shard, style, name, group, caption, sha256 (of the PNG)
    out/card.md, card.json   packages, versions, licences, counts
    out/split.json      the style held out unless a caller names another

The folder appears by rename when it is complete. A complete folder of the same version is used as it is.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data import npm
from otcclip.data.atomic import atomic_file, atomic_folder, write_json, write_text
from otcclip.data.card import CORPUS, count, make_card, render_card
from otcclip.data.emoji_icons import Drawing, draw, plan
from otcclip.data.emoji_spec import DEFAULT_STYLE, EMOJI, NEAR_SIBLINGS, EmojiSpec
from otcclip.data.pairs import Pair
from otcclip.data.shards import write_shard
from otcclip.errors import UserError
from otcclip.progress import track

# Drawings handed to a process at a time: a tenth of a second's work.
_CHUNK = 64
INDEX_COLUMNS = ("key", "shard", "style", "name", "group", "caption", "sha256")


@dataclass(frozen=True)
class EmojiCorpus:
    """A corpus on disk. `reused` says that it was there already and nothing was built."""

    folder: Path
    hold_out: str
    pairs: int
    names: int
    plain_pairs: int
    plain_names: int
    reused: bool


def build_emoji(
    out: Path | str,
    *,
    hold_out: str | None = None,
    node_modules: Path | None = None,
    spec: EmojiSpec = EMOJI,
    workers: int = 1,
) -> EmojiCorpus:
    """Build the corpus at `out`, or reuse it when a complete one of this version is there.

    All styles are written; `hold_out` only sets the split that `load_emoji` makes by default, also of a
    reused corpus. None leaves what a reused corpus has, so that a run which names its own split changes no other's.

    Args:
        out: the corpus's folder; a corpus of another version or a damaged one is replaced, any other folder
            refused.
        hold_out: style of the default test split; DEFAULT_STYLE where none was ever chosen.
        node_modules: packages already installed; by default npm installs them to a temporary folder.
        spec: packages and counts.
        workers: processes that draw; the corpus is the same bytes with any number. More than one needs a caller whose
            main module can be imported again, as `multiprocessing` says.

    Raises:
        UserError: unknown style, no npm, a package missing or at another version, counts that do not come
            out, a full disk, or a folder at `out` that is no emoji corpus. Nothing half-written is left.
    """
    folder = Path(out)
    if hold_out is not None:
        check_style(hold_out, spec.styles)
    card = read_card(folder)
    if card is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no emoji corpus; name another folder")
    reused = card is not None and _complete(folder, card, spec)
    if not reused:
        if node_modules is not None:
            _build(folder, node_modules, spec, workers)
        else:
            with tempfile.TemporaryDirectory(prefix="otcclip-npm-", ignore_cleanup_errors=True) as scratch:
                _build(folder, npm.install(spec.packages, Path(scratch)), spec, workers)
    if hold_out is None:
        hold_out = (read_split(folder) if reused else None) or DEFAULT_STYLE
    _write_split(folder, hold_out)
    return EmojiCorpus(folder, hold_out, spec.pairs, spec.names, spec.plain_pairs, spec.plain_names, reused=reused)


def check_style(style: str, styles: Sequence[str]) -> None:
    """Raise UserError, listing the styles there are, unless `style` is one of them."""
    if style not in styles:
        raise UserError(f"unknown style {style!r}: choose one of {', '.join(sorted(styles))}")


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of an emoji corpus; None where there is none."""
    try:
        card = json.loads((folder / "card.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and card.get("corpus") == CORPUS else None


def _complete(folder: Path, card: dict[str, Any], spec: EmojiSpec) -> bool:
    """Whether the folder is this version and whole: packages, counts, shards' sizes, the index's rows."""
    try:
        packages = [(package["name"], package["version"]) for package in card["packages"]]
        return (
            card["version"] == spec.version
            and packages == [(package.name, package.version) for package in spec.packages]
            and all(card["counts"][name] == expected for name, expected in _expected(spec).items())
            and all((folder / shard["name"]).stat().st_size == shard["bytes"] for shard in card["shards"])
            and pq.read_metadata(folder / "index.parquet").num_rows == spec.pairs
        )
    except (OSError, KeyError, TypeError, pa.ArrowException):
        return False


def _expected(spec: EmojiSpec) -> dict[str, int]:
    return {name: getattr(spec, name) for name in ("pairs", "names", "plain_pairs", "plain_names")}


def _build(folder: Path, node_modules: Path, spec: EmojiSpec, workers: int) -> None:
    manifests = npm.check(node_modules, spec.packages)
    drawings = plan(node_modules, spec)
    _check_counts(drawings, spec)
    with atomic_folder(folder) as temporary:
        with _drawn(drawings, workers) as pairs:
            shards, rows = _write_shards(temporary, drawings, pairs, spec.shard_pairs)
        with atomic_file(temporary / "index.parquet") as handle:
            pq.write_table(pa.table({name: [row[name] for row in rows] for name in INDEX_COLUMNS}), handle)
        card = make_card(spec, node_modules, manifests, drawings, shards)
        write_text(temporary / "card.md", render_card(card))
        write_json(temporary / "card.json", card)


def _check_counts(drawings: Sequence[Drawing], spec: EmojiSpec) -> None:
    """Before anything is drawn: packages that give other counts are not the corpus that was measured."""
    found = count(drawings)
    wrong = [
        f"{name} {found[name]} instead of {expected}"
        for name, expected in _expected(spec).items()
        if found[name] != expected
    ]
    if wrong:
        raise UserError(f"the emoji packages do not give the expected corpus: {', '.join(wrong)}")


@contextmanager
def _drawn(drawings: Sequence[Drawing], workers: int) -> Iterator[Iterator[Pair]]:
    """The pairs, in order. By processes: the renderer holds the interpreter's lock."""
    if workers <= 1:
        yield map(draw, drawings)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends them
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, initializer=signal.signal, initargs=ignore)
    try:
        yield pool.map(draw, drawings, chunksize=_CHUNK)
    except BrokenProcessPool as error:
        raise UserError("a process that draws the emoji was ended (out of memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shards(
    folder: Path, drawings: Sequence[Drawing], pairs: Iterator[Pair], shard_pairs: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    shards: list[dict[str, Any]] = []
    rows: list[dict[str, str]] = []
    waiting = track(zip(drawings, pairs, strict=True), "drawing emoji", total=len(drawings))
    for number in range(-(-len(drawings) // shard_pairs)):
        name = f"{number:05d}.tar"
        batch = islice(waiting, shard_pairs)  # one progress bar over all shards
        written = write_shard(folder / name, _indexed(batch, name, rows))
        shards.append({"name": name, "pairs": written, "bytes": (folder / name).stat().st_size})
    return shards, rows


def _indexed(drawn: Iterable[tuple[Drawing, Pair]], shard: str, rows: list[dict[str, str]]) -> Iterator[Pair]:
    for drawing, pair in drawn:
        rows.append(
            {
                "key": pair.key,
                "shard": shard,
                "style": drawing.style,
                "name": drawing.emoji.name,
                "group": drawing.emoji.group,
                "caption": pair.caption,
                "sha256": hashlib.sha256(pair.image).hexdigest(),
            }
        )
        yield pair


def _write_split(folder: Path, hold_out: str) -> None:
    """Record the default split, unless it is recorded already."""
    if read_split(folder) == hold_out:
        return
    sibling = NEAR_SIBLINGS.get(hold_out)
    write_json(folder / "split.json", {"hold_out": hold_out, "left_out_of_training": [sibling] if sibling else []})


def read_split(folder: Path) -> str | None:
    """The style that the corpus holds out by default; None when none is recorded."""
    try:
        value = json.loads((folder / "split.json").read_text("utf-8"))["hold_out"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None
