"""The matrix of attacks and defences, cell by cell.

`groups` says what is planted together, `plan` what the cells are, `cell` trains one, `matrix` trains them all, `log`
keeps `bench.json`.
"""

from otcclip.bench.matrix import run_bench
from otcclip.bench.plan import BenchSpec

__all__ = ["BenchSpec", "run_bench"]
