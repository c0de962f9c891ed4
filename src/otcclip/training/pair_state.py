"""What a run holds of each pair, by key: while it trains, when it is done, and to know the pairs again.

    StateTable.open("logs/run/pairs.state").get(keys)["action"]      # while it trains; any keys, in any order

Neither file is read by a resume: what a defence has learned is in the checkpoint, in the order of the keys' numbers
(`PairData.in_key_order`), and `contents` tells whether those are the pairs of today.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.data.atomic import atomic_file
from otcclip.data.keys import hash_keys
from otcclip.data.state import StateTable
from otcclip.defenses.base import ACTIONS, Decisions, TrainingPairs
from otcclip.errors import UserError

COLUMNS = {"suspicion": "<f4", "action": "i1", "caption": "<i4"}


def contents(pairs: TrainingPairs) -> str:
    """How many pairs, and a digest of their keys and captions in order; images are not looked at."""
    digest = hashlib.sha256(hash_keys(pairs.keys).tobytes())
    digest.update(hash_keys(pairs.captions).tobytes())
    digest.update(pairs.caption_of.numpy().tobytes())
    return f"{len(pairs)}:{digest.hexdigest()}"


def state_table(path: Path, pairs: TrainingPairs) -> StateTable:
    """The table at `path` if its records are these pairs, in order; else a new one.

    Raises:
        UserError: a full disk.
    """
    if path.exists():
        with contextlib.suppress(UserError):  # damaged: written anew
            table = StateTable.open(path)
            known = table.records.dtype.names == ("key", *COLUMNS)
            if known and np.array_equal(table.records["key"], hash_keys(pairs.keys)):
                return table
    return StateTable.create(path, pairs.keys, **COLUMNS)


def put_state(table: StateTable, decided: Decisions) -> None:
    """Put what is decided of every pair, in the order of the table's records.

    `action` is a row of `ACTIONS`, `caption` the number of the caption in force among the distinct ones, sorted.
    """
    table.records["suspicion"] = decided.suspicion
    table.records["action"] = decided.action
    table.records["caption"] = decided.caption_of
    table.flush()


def write_decisions(path: Path, decided: Decisions, pairs: TrainingPairs) -> None:
    """What is decided of every pair, as a Parquet file: `key, action, suspicion, caption` (the caption in force)."""
    columns = {
        "key": pa.array(pairs.keys, pa.string()),
        "action": pa.array(np.asarray(ACTIONS, object)[decided.action], pa.string()),
        "suspicion": pa.array(decided.suspicion.astype(np.float32)),
        "caption": pa.array([pairs.captions[i] for i in decided.caption_of], pa.string()),
    }
    with atomic_file(path) as handle:
        pq.write_table(pa.table(columns), handle)
