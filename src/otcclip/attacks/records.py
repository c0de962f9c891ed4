"""`poison.parquet`: the ground truth of a poisoned corpus, one `PoisonRecord` a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from otcclip.attacks.base import PoisonRecord
from otcclip.data.atomic import atomic_file
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
    """Write `records` to `path`, whole or not at all.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
    with atomic_file(path) as handle:
        pq.write_table(table, handle)


def read_records(path: Path | str) -> tuple[PoisonRecord, ...]:
    """The records in `path`, in file order.

    Raises:
        UserError: no such file, not Parquet, or without the columns of a poison file.
    """
    try:
        # Not read_table: given a folder, that joins whatever files lie in it.
        with pq.ParquetFile(path) as file:
            table = file.read()
        if missing := [name for name in SCHEMA.names if name not in table.column_names]:
            raise UserError(f"{path}: not a poison record file, it lacks the columns {', '.join(missing)}")
        rows = table.select(SCHEMA.names).cast(SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as a poison record file ({str(error).splitlines()[0]})") from None
    return tuple(PoisonRecord(**row) for row in rows)
