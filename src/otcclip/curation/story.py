"""A scan's summary for the terminal. Names of units and keys are a stranger's text and are printed as such."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from otcclip.curation.scan import Scan
from otcclip.data.decode import printable


def print_summary(scan: Scan) -> None:
    """Counts, throughput, and detection where the truth is known."""
    summary, console = scan.summary(), Console()
    actions = ", ".join(f"{count:,} {name}" for name, count in summary["actions"].items())
    console.print(f"{summary['pairs']:,} pairs: {actions}", highlight=False)
    if summary["skipped"]:
        reasons = ", ".join(f"{count:,} {printable(name)}" for name, count in summary["skipped"].items())
        console.print(f"skipped, see skipped.parquet: {reasons}", highlight=False, markup=False)
    speed = summary["throughput"]
    console.print(
        f"{speed['pairs_per_second']:,.0f} pairs/s; the encoder alone {speed['encoder_pairs_per_second']:,.0f} pairs/s "
        f"({speed['ratio']:.2f}x)",
        highlight=False,
    )
    if "truth" in summary:
        console.print(_detection(summary["truth"]))
        for attack, rate in summary["truth"].get("repair", {}).items():
            name = printable(attack) or "honest"
            console.print(
                f"re-paired {name}: {rate['value']:.1%} of {rate['n']} name what the image shows "
                f"({rate['low']:.1%} to {rate['high']:.1%})",
                highlight=False,
                markup=False,
            )


def _detection(truth: dict[str, Any]) -> Table:
    attacks = list(truth["actions"])
    table = Table(title="AUROC (FPR at 95 % TPR)")
    table.add_column("score", no_wrap=True)  # on a narrow terminal the attacks fold and no name is cut
    for attack in attacks:
        table.add_column(escape(printable(attack)), justify="right", overflow="fold")
    for score, found in truth["detection"].items():
        cells = (f"{found[attack]['auroc']:.3f} ({found[attack]['fpr95']:.2f})" for attack in attacks)
        table.add_row(score.removesuffix("_score"), *cells)
    return table
