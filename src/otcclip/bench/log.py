"""`bench.json`: what a folder of cells is of, what went wrong, and how long it took; the report's first file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from otcclip.bench.plan import Cell, reference_of
from otcclip.data.atomic import write_json
from otcclip.errors import UserError

BENCH = "bench.json"
# What all cells of a folder share: a matrix of two settings compares nothing.
SHARED = ("dataset", "target", "epochs", "model", "batch_size", "lr", "train_pairs", "test_images", "otcclip")


class MatrixLog:
    """The matrix's `bench.json`, written when asked to and after every cell, so that a kill costs a cell's seconds.

    Calls add up: groups, defences and seeds of a later call join those already there, and wall times are summed.
    """

    def __init__(self, out: Path, cells: Sequence[Cell], settings: Mapping[str, Any], processes: int) -> None:
        """Raises UserError where the folder holds a matrix with other settings. Nothing is written yet."""
        self.path = out / BENCH
        before = _read(self.path)
        for name in SHARED:
            if before and before.get(name) != settings[name]:
                raise UserError(
                    f"{out}: holds a matrix with {name} {before.get(name)}, this one has {settings[name]}; "
                    "name another --out"
                )
        self.failures: dict[str, str] = {}
        self._start = time.perf_counter()
        self._calls = list(before.get("calls", []))
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._processes, self._trained = processes, 0
        # Whatever fails in this call is told anew: trials too, where this call has them.
        mine = {cell.name for cell in cells} | {cell.trial for cell in cells if reference_of(cell, cells) is not None}
        self._failed_before = {name: why for name, why in before.get("failures", {}).items() if name not in mine}
        self._object = {
            **settings,
            "groups": {**before.get("groups", {}), **{cell.group.label: list(cell.group.attacks) for cell in cells}},
            "defenses": _union(before.get("defenses", []), [cell.defense.label for cell in cells]),
            "seeds": sorted(_union(before.get("seeds", []), [cell.seed for cell in cells])),
        }

    def trained(self) -> None:
        """One more cell is done."""
        self._trained += 1
        self.write()

    def failed(self, name: str, reason: str) -> None:
        """A cell could not be trained."""
        self.failures[name] = reason
        self.write()

    def write(self) -> None:
        """Write `bench.json` as things stand."""
        seconds = round(time.perf_counter() - self._start, 1)
        call = {"started": self._started, "processes": self._processes, "trained": self._trained, "seconds": seconds}
        calls = [*self._calls, call]
        wall = round(sum(call["seconds"] for call in calls), 1)
        failures = {**self._failed_before, **self.failures}
        write_json(self.path, {**self._object, "failures": failures, "calls": calls, "wall_seconds": wall})

    def seconds(self) -> tuple[float, float]:
        """Wall seconds of this call, and of all calls that made the matrix."""
        mine = time.perf_counter() - self._start
        return mine, mine + sum(call["seconds"] for call in self._calls)


def _union(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys([*old, *new]))


def _read(path: Path) -> dict[str, Any]:
    """What a former call wrote; empty where there was none.

    Raises:
        UserError: a file of that name that is not ours.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a matrix's settings; name another --out") from error
    if not isinstance(found, dict) or not set(SHARED) <= set(found):
        raise UserError(f"{path}: not a matrix of otcclip; name another --out")
    return found
