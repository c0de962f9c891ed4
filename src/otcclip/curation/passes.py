"""The two passes of a scan over its units: every unit is encoded, then every unit is scored against one reference."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from otcclip import __version__
from otcclip.curation.encode import encode_unit, is_encoded
from otcclip.curation.encoders import ScanEncoder
from otcclip.curation.options import ScanOptions
from otcclip.curation.score import Census, load_reference, score_unit, scored
from otcclip.curation.spread import spread
from otcclip.curation.units import Unit
from otcclip.data.atomic import write_json
from otcclip.detectors import Detector, PairFeatures
from otcclip.errors import UserError
from otcclip.progress import track


def encode_units(
    units: Sequence[Unit], encoder: ScanEncoder, folder: Path, options: ScanOptions
) -> tuple[tuple[str, str], ...]:
    """Encode what is not encoded; returns the units that could not be read, with the reason."""
    todo = [unit for unit in units if not is_encoded(unit, folder)]

    def one(unit: Unit) -> tuple[str, str] | None:
        try:
            encode_unit(unit, encoder, folder, options.limits)
        except UserError as error:
            if not _is_readable_disk(folder):
                raise
            write_json(folder / "failed" / unit.name, {"source": unit.source, "reason": str(error)})
            return unit.name, str(error)
        (folder / "failed" / unit.name).unlink(missing_ok=True)
        return None

    return tuple(failure for failure in spread(one, todo, "encoding", ray=options.ray) if failure is not None)


def _is_readable_disk(folder: Path) -> bool:
    """Whether the output can still be written: a full disk is everybody's failure, a broken shard only its own."""
    try:
        write_json(folder / "failed" / ".probe", {})
    except UserError:
        return False
    (folder / "failed" / ".probe").unlink(missing_ok=True)
    return True


class Scoring:
    """The second pass of one job; the reference is loaded when it is first needed."""

    def __init__(
        self,
        there: Sequence[Unit],
        folder: Path,
        census: Census,
        encoder: tuple[bool, bool],
        detectors: Sequence[Detector],
        options: ScanOptions,
    ) -> None:
        self.there, self.folder, self.census = there, folder, census
        self.encoder, self.detectors, self.options = encoder, detectors, options
        self.mark = json.dumps([census.mark, list(options.detectors), options.rule.as_dict(), __version__])
        self._reference: PairFeatures | None = None

    def reference(self) -> PairFeatures:
        if self._reference is None:
            self._reference = load_reference(self.there, self.folder, self.census, self.encoder)
        return self._reference

    def run(self, mine: Sequence[Unit]) -> int:
        """Score this job's units; returns how many of the others' are not scored yet."""
        todo = [unit for unit in mine if unit in self.there and scored(unit, self.folder, self.mark) is None]
        begun = time.perf_counter()
        for unit in track(todo, "scoring"):
            rows = self.census.usable[unit.name]
            score_unit(unit, self.folder, self.reference(), rows, self.detectors, self.options.rule, self.mark)
        if todo:
            timing = self.folder / "timing" / f"{self.options.shard_index}.json"
            write_json(timing, {"seconds": time.perf_counter() - begun})
        return sum(scored(unit, self.folder, self.mark) is None for unit in self.there)
