"""`otcclip report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def report(run: Annotated[Path, tyro.conf.Positional]) -> None:
    """Make report.html of a run's folder again, from its result files alone.

    Args:
        run: the folder.
    """
    from otcclip.progress import console
    from otcclip.report import results_table, write_report

    page = write_report(run)
    console.print(results_table(run))
    console.print(f"report: {page}")
