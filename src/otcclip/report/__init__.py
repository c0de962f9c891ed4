"""Reports from a run's files alone (docs/formats.md): one self-contained page, and a table for the terminal.

    from otcclip.report import results_table, write_report
    write_report(Path("runs/demo"))   # -> runs/demo/report.html

`fields` checks JSON objects, `files` reads a run folder into `records`; `story` says what happened, `curves`
draws it, `tiles` picks the images, `table` lays out the results, `page` writes the HTML (templates/). The
`matrix` files do the same for a folder of `otcclip bench`. No
other room of otcclip is imported, so a report can be made where there is no model and no corpus.
"""

from otcclip.report.matrix_files import is_matrix
from otcclip.report.matrix_page import matrix_table, write_matrix
from otcclip.report.page import write_report
from otcclip.report.table import results_table

__all__ = ["is_matrix", "matrix_table", "results_table", "write_matrix", "write_report"]
