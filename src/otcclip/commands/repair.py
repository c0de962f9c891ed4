"""`otcclip repair`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def repair(
    scan: Annotated[Path, tyro.conf.Positional],
    out: Path = Path("repaired"),
    to: Literal["wds", "csv", "parquet", "datacomp-npy", "hf"] | None = None,
    alpha: float | None = None,
    likely: float | None = None,
    margin: float | None = None,
    no_repair: bool = False,
) -> None:
    """Keep, re-pair or drop the pairs of a scan by a stated rule: a manifest, or a new data set. The input stays.

    Keep where the probability of a lie is at most alpha; re-pair where it is at least `likely`, look-alikes second the
    nominee, and it wins by the margin; drop the others. Levels not given are the scan's.

    Args:
        scan: folder of a finished scan.
        out: folder for manifest.parquet and the new data set; it must not be there yet.
        to: also write the pairs that stay: WebDataset shards, open_clip CSV, Parquet, DataComp uids, or HF datasets.
        alpha: most that the probability of a lie may be for a pair to be kept.
        likely: least that it must be for a pair to be given another caption.
        margin: by how much the nominee must be nearer than the next candidate.
        no_repair: drop what would be re-paired.
    """
    from dataclasses import replace

    from otcclip.curation import Scan
    from otcclip.curation.repair import repair as run

    done = Scan.load(scan)
    rule = done.rule()
    levels = {"alpha": alpha, "likely": likely, "margin": margin}
    given = {name: value for name, value in levels.items() if value is not None}
    rule = replace(rule, repair=rule.repair and not no_repair, **given)
    result = run(done, out, rule, to)
    print(", ".join(f"{count:,} {name}" for name, count in result.actions.items()))
    if result.skipped:
        print(f"{result.skipped:,} more, which the scan skipped (see skipped.parquet): drop")
    if result.data is not None:
        print(f"{result.written:,} pairs written to {result.data}")
    print(f"manifest: {result.manifest}; use it with `otcclip train --manifest {result.manifest}`")
