"""How to scan: what `otcclip scan` asks on its command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from otcclip.curation.decide import Rule
from otcclip.data.decode import DEFAULT_LIMITS, Limits
from otcclip.data.readers import ReadOptions
from otcclip.detectors import DETECTORS
from otcclip.errors import UserError


@dataclass(frozen=True)
class ScanOptions:
    """How to scan.

    Attributes:
        dataset_type: a reader's name, or auto. read: its options.
        detectors: names of the detectors to run. rule: what decides actions.
        reference: most pairs that others are compared with.
        shard_index, num_shards: which units are this job's.
        max_bad: share of bad pairs past which the scan stops.
        resume: go on with a scan found in the folder.
        ray: run units on a Ray cluster.
    """

    dataset_type: str = "auto"
    read: ReadOptions = field(default_factory=ReadOptions)
    detectors: tuple[str, ...] = tuple(DETECTORS)
    rule: Rule = field(default_factory=Rule)
    reference: int = 16_384
    shard_index: int = 0
    num_shards: int = 1
    max_bad: float = 0.05
    limits: Limits = DEFAULT_LIMITS
    resume: bool = False
    ray: bool = False

    def __post_init__(self) -> None:
        if self.reference < 2:
            raise UserError(f"--reference {self.reference}: at least 2 pairs")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"--max-bad {self.max_bad}: a share in 0..1")
        if not 0 <= self.shard_index < self.num_shards:
            raise UserError(f"--shard-index {self.shard_index} of --num-shards {self.num_shards}: 0 and up, below it")
        if len(set(self.detectors)) < len(self.detectors):
            raise UserError(f"--detectors {' '.join(self.detectors)}: one is named twice")
