"""`poison.parquet`: the ground truth of a poisoned corpus, one `PoisonRecord` a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.attacks.base import PoisonRecord
from otcclip.errors import UserError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("attack", pa.string()),
        ("trigger", pa.string()),
        ("location", pa.string()),
        ("target", pa.string()),
        ("seed", pa.int64()),
        ("original_caption", pa.string()),
    ]
)


def write_records(path: Path | str, records: Iterable[PoisonRecord]) -> None:
    """Write `records` to `path` atomically: a reader sees the old file or the new one, never a part."""
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        pq.write_table(table, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_records(path: Path | str) -> tuple[PoisonRecord, ...]:
    """The records in `path`, in file order.

    Raises:
        UserError: no such file, not Parquet, or without the columns of a poison file.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path}: cannot be read as a poison record file ({str(error).splitlines()[0]})"
        ) from None
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise UserError(f"{path}: not a poison record file, it lacks the columns {', '.join(missing)}")
    return tuple(PoisonRecord(**row) for row in table.select(SCHEMA.names).to_pylist())
