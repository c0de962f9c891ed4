"""A manifest: what to do with each pair, by key, so that nothing has to be re-sharded to be filtered.

    manifest = read_manifest("scan/scan.parquet")            # or what `otcclip repair` wrote
    for pair in manifest.apply(read_shard("00000.tar")):     # dropped pairs are gone, re-paired ones have new captions
        ...

Any Parquet file with the columns `key`, `action` (keep, re-pair or drop) and `new_caption` is one; further columns are
not read. docs/formats.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.decode import printable
from otcclip.data.pairs import Pair
from otcclip.errors import UserError

Action = Literal["keep", "re-pair", "drop"]
ACTIONS: tuple[str, ...] = get_args(Action)
COLUMNS = ("key", "action", "new_caption")


@dataclass(frozen=True)
class Manifest:
    """What is to be done with the pairs of a data set.

    Attributes:
        path: the file it was read from, for messages.
        keep: keys of pairs that stay as they are.
        new_caption: key -> caption, for pairs that are re-paired.
        drop: keys of pairs that are left out.
    """

    path: str
    keep: frozenset[str]
    new_caption: Mapping[str, str]
    drop: frozenset[str]

    def __len__(self) -> int:
        return len(self.keep) + len(self.new_caption) + len(self.drop)

    def caption(self, key: str, caption: str) -> str | None:
        """The caption in force for a pair that carries `caption`; None if the pair is dropped.

        Raises:
            UserError: the manifest says nothing of this pair: it was never judged.
        """
        if key in self.keep:
            return caption
        if key in self.drop:
            return None
        if key in self.new_caption:
            return self.new_caption[key]
        raise UserError(
            f"{self.path}: says nothing of pair {printable(key)!r}; it belongs to another data set, or the scan is not "
            "finished"
        )

    def apply(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """`pairs` without those dropped, re-paired ones under their new caption; the others as they came.

        Raises:
            UserError: as `caption`.
        """
        for pair in pairs:
            caption = self.caption(pair.key, pair.caption)
            if caption is not None:
                yield pair if caption == pair.caption else replace(pair, caption=caption)


def apply_manifest(pairs: Iterable[Pair], path: Path | str) -> Iterator[Pair]:
    """`read_manifest(path).apply(pairs)`."""
    return read_manifest(path).apply(pairs)


def read_manifest(path: Path | str) -> Manifest:
    """The manifest in the Parquet file `path`.

    Raises:
        UserError: no such file, not Parquet, a column missing, an unknown action, a key given twice, or a re-pairing
            without a caption.
    """
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                raise UserError(f"{path}: not a manifest, it lacks the columns {', '.join(missing)}")
            table = file.read(columns=list(COLUMNS))
            keys, actions, captions = (table[name].cast(pa.large_string()).to_pylist() for name in COLUMNS)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({str(error).splitlines()[0]})") from None
    sets: dict[str, set[str]] = {action: set() for action in ACTIONS}
    new: dict[str, str] = {}
    for key, action, caption in zip(keys, actions, captions, strict=True):
        if action not in sets or key is None:
            raise UserError(f"{path}: action {printable(str(action))!r} is none of {', '.join(ACTIONS)}")
        sets[action].add(key)
        if action == "re-pair":
            if not caption:
                raise UserError(f"{path}: pair {printable(key)!r} is re-paired without a new caption")
            new[key] = caption
    if len(set().union(*sets.values())) != len(keys):
        raise UserError(f"{path}: a key is given twice")
    return Manifest(str(path), frozenset(sets["keep"]), new, frozenset(sets["drop"]))
