"""`otcclip report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def report(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make report.html of a run's or a scan's folder again, from its result files alone.

    Args:
        run: the folder.
    """
    from otcclip.progress import console
    from otcclip.report import results_table, write_report
    from otcclip.report.scan import write_scan_report

    if (run / "scan.parquet").is_file():
        print(f"report: {write_scan_report(run)}")
        return
    page = write_report(run)
    console.print(results_table(run))
    console.print(f"report: {page}")
