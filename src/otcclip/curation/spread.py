"""Runs one function over units: here one after another, or on a Ray cluster (extra `[ray]`). Results keep their
order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from otcclip.errors import UserError
from otcclip.progress import track

T = TypeVar("T")
U = TypeVar("U")


def spread(work: Callable[[T], U], items: Sequence[T], what: str, *, ray: bool = False) -> list[U]:
    """`[work(item) for item in items]`.

    Raises:
        UserError: Ray is asked for and not installed; and whatever `work` raises.
    """
    if not ray:
        return [work(item) for item in track(items, what, total=len(items))]
    try:
        import ray.data as ray_data
    except ImportError:
        raise UserError("--ray: Ray is not installed; pip install 'otcclip[ray]'") from None

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"place": row["item"], "result": work(items[row["item"]])}

    rows = ray_data.from_items(list(range(len(items)))).map(run).take_all()
    return [row["result"] for row in sorted(rows, key=lambda row: int(row["place"]))]
