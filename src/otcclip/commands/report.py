"""`otcclip report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def report(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make report.html of a run's, a matrix's or a scan's folder again, from its result files alone.

    Args:
        run: the folder.
    """
    from otcclip.progress import console
    from otcclip.report import is_matrix, matrix_table, results_table, write_matrix, write_report
    from otcclip.report.scan import write_scan_report

    if (run / "scan.parquet").is_file():
        print(f"report: {write_scan_report(run)}")
        return
    page, table = (write_matrix, matrix_table) if is_matrix(run) else (write_report, results_table)
    path = page(run)
    console.print(table(run))
    console.print(f"report: {path}")
