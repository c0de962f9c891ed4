"""What a run's files say, as frozen records. `files.py` fills them; the rest of this room reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

NEVER_POISONED = "clip-clean"  # the same training on pairs without poison: a reference, not a defence
UNDEFENDED = "clip"  # plain CLIP training: the run every defence is measured against
HOUSE_DEFENSE = "otcclip"


@dataclass(frozen=True)
class Cell:
    """One value of an Arrow column, fetched when asked for: a gallery holds far more images than a page."""

    column: pa.ChunkedArray
    row: int

    def read(self) -> bytes:
        value = self.column[self.row].as_py()
        return value if isinstance(value, bytes) else b""


@dataclass(frozen=True)
class Rate:
    """An attack's success rate: a share in 0…1 over `n` test images, with its 95 % interval."""

    asr: float
    n: int
    low: float
    high: float

    @property
    def hits(self) -> int:
        return round(self.asr * self.n)


@dataclass(frozen=True)
class Result:
    """One object of results.json."""

    defense: str
    seed: int
    epochs: int
    top1: float
    top5: float
    attacks: Mapping[str, Rate]
    clean_asr: Mapping[str, float]
    seconds: float | None
    pairs_kept: int | None
    pairs_total: int | None
    poison_kept: Mapping[str, int]
    poison_total: Mapping[str, int]
    test_images: int | None
    peak_memory: float | None  # bytes


@dataclass(frozen=True)
class Epoch:
    """One line of history.jsonl; `None` and empty where that epoch was not evaluated or judged nothing."""

    epoch: int
    warm_up: bool
    top1: float | None
    attacks: Mapping[str, Rate]
    kept: int | None
    poison_kept: Mapping[str, int]
    trust_auroc: Mapping[str, float]
    repair_precision: float | None


@dataclass(frozen=True)
class Shot:
    """One row of gallery.parquet: a test image under attack and what one model says of it."""

    attack: str
    key: str
    true_name: str
    target: str
    clean_prediction: str
    prediction: str
    confidence: float | None
    image: Cell
    clean_image: Cell

    @property
    def fooled(self) -> bool:
        return self.prediction == self.target

    @property
    def right(self) -> bool:
        return self.prediction == self.true_name


@dataclass(frozen=True)
class JudgedPair:
    """One row of pairs.parquet: what a defence did with a training pair."""

    key: str
    caption: str
    new_caption: str | None
    action: str
    suspicion: float | None
    attack: str
    true_name: str
    image: Cell


@dataclass(frozen=True)
class DefenseFiles:
    """The folder of one defence. `pairs` is `None` where the defence judges no pairs."""

    name: str
    epochs: tuple[Epoch, ...]
    gallery: tuple[Shot, ...]
    pairs: tuple[JudgedPair, ...] | None


@dataclass(frozen=True)
class Run:
    """A run folder. `poison` is key → the caption before the attack; `None` where no truth is known."""

    folder: Path
    settings: Mapping[str, object]
    results: tuple[Result, ...]
    defenses: tuple[DefenseFiles, ...]
    poison: Mapping[str, str] | None

    @property
    def attacks(self) -> list[str]:
        """Every attack that was measured, in the order the results name them."""
        return list(dict.fromkeys(name for result in self.results for name in result.attacks))

    def result(self, defense: str) -> Result | None:
        """The result of `defense`; its lowest seed, where there are several."""
        rows = [r for r in self.results if r.defense == defense]
        return min(rows, key=lambda r: r.seed) if rows else None

    def defended(self) -> Result | None:
        """The run the headline is about: otcclip where it was run, else the last named; never the best."""
        others = [r.defense for r in self.results if r.defense not in (UNDEFENDED, NEVER_POISONED)]
        if not others:
            return None
        return self.result(HOUSE_DEFENSE if HOUSE_DEFENSE in others else others[-1])
