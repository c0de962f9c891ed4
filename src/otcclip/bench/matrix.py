"""The matrix, end to end: check everything, train what is missing, write what the report reads.

    run_bench(BenchSpec("corpora/emoji", "runs/matrix", attacks=("plain",), defenses=("clip", "otcclip")))

Whatever is finished is reused and whatever was cut off goes on, cell by cell. A cell that cannot be trained is listed
with its reason; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from otcclip import __version__
from otcclip.bench.cell import NEVER_POISONED, finished_cell, run_cell, try_never_poisoned
from otcclip.bench.groups import parse_groups
from otcclip.bench.lock import sole_bench
from otcclip.bench.log import MatrixLog
from otcclip.bench.plan import (
    UNDEFENDED,
    BenchSpec,
    Cell,
    check_attacks,
    parse_defense,
    plan,
    reference_of,
)
from otcclip.data.emoji import build_emoji, read_card
from otcclip.data.emoji_load import load_emoji
from otcclip.data.emoji_spec import EMOJI
from otcclip.errors import UserError
from otcclip.models import open_clip_model_size
from otcclip.progress import console
from otcclip.report import matrix_table, write_matrix
from otcclip.training.experiment import RunSpec, check_free, start_of
from otcclip.training.fleet import Job, cores, run_fleet
from otcclip.training.setting import surrogate_of, total_epochs
from otcclip.training.utility import check_measures


def run_bench(bench: BenchSpec, processes: int | None = None) -> list[dict[str, Any]]:
    """Train what is missing of the matrix, `processes` cells at a time (one a core by default), one thread each.

    Returns:
        The objects of the cells' `cell.json`; those that failed are left out.

    Raises:
        UserError: whatever cannot be done, before any training: also another call at work in the folder, and a finished
            run there of other files; or, after it, a line on the cells that failed.
    """
    workers = cores() if processes is None else processes
    if workers < 1:
        raise UserError(f"--processes {workers}: at least 1")
    cells, settings = prepare(bench)  # outside the lock: what is refused here leaves no folder
    with sole_bench(Path(bench.out)):
        return _run(bench, cells, settings, workers)


def _run(bench: BenchSpec, cells: Sequence[Cell], settings: dict[str, Any], workers: int) -> list[dict[str, Any]]:
    jobs = jobs_of(cells)
    log = MatrixLog(Path(bench.out), cells, settings, workers)
    for cell in cells:
        check_free(cell.run)  # a patch or a corpus that changed since: no other cell is trained before that is said
    log.write()
    console.print(f"{len(cells)} cells, {len(cells) - sum(finished_cell(c) is None for c in cells)} of them finished")

    def ended(job: Job, result: dict[str, Any] | UserError) -> None:
        if isinstance(result, UserError):
            log.failed(job.name, str(result))
            console.print(f"{job.name}: {result}", style="red", markup=False, highlight=False, soft_wrap=True)
        elif "attack" in result:
            log.trained()
            console.print(_line(job.name, result), markup=False, highlight=False, soft_wrap=True)

    run_fleet(jobs, workers, on_done=ended, keep_going=True)
    log.write()
    found = [done for cell in cells if (done := finished_cell(cell)) is not None]
    if found:
        page = write_matrix(Path(bench.out))
        console.print(matrix_table(Path(bench.out)))
        console.print(f"report: {page}", soft_wrap=True)
    mine, total = log.seconds()
    console.print(f"wall time {mine:,.0f} s, of the whole matrix {total:,.0f} s ({workers} processes)", soft_wrap=True)
    if log.failures:
        name, why = next(iter(log.failures.items()))
        raise UserError(f"{len(log.failures)} of {len(jobs)} jobs failed; {name}: {why}")
    return found


def prepare(bench: BenchSpec) -> tuple[tuple[Cell, ...], dict[str, Any]]:
    """The cells, with everything checked that can be without training, and the settings that they share.

    Builds the corpus where there is none. Loading it here decodes it, once, into the memory-mapped file beside the
    shards that every cell's process then reads.

    Raises:
        UserError: an unknown name, a value out of range, a target that is no class, more poison than pairs.
    """
    parse_groups(bench.attacks)  # names first: no corpus is built for a misspelt one
    for text in bench.defenses:
        parse_defense(text)
    corpus = Path(bench.corpus)
    card = read_card(corpus)
    if card is None or card.get("version") != EMOJI.version:
        build_emoji(corpus, workers=cores())
    size = open_clip_model_size(RunSpec.model)
    split = load_emoji(corpus, size, bench.hold_out)
    check_measures(bench.utility, corpus, size)
    cells = plan(bench, len(split.train))
    check_attacks(cells, split)
    run = cells[0].run
    settings = {
        "dataset": f"emoji/{split.hold_out}",
        "left_out": list(split.left_out),
        "target": bench.target,
        "epochs": bench.epochs,
        "model": run.model,
        "image_size": size,
        "batch_size": run.batch_size,
        "lr": run.lr,
        "train_pairs": len(split.train),
        "test_images": len(split.test),
        "otcclip": __version__,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "numpy")},
    }
    return cells, settings


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """What is missing, in an order in which nothing waits long: a job a cell, and one for each attack-free trial."""
    missing = [cell for cell in cells if finished_cell(cell) is None]
    training = {cell.folder: cell.name for cell in missing}
    jobs = []
    for cell in missing:
        needed = {training[one.folder] for one in _first(cell, cells) if one.folder in training} - {cell.name}
        jobs.append(Job(cell.name, partial(run_cell, cell), cell.folder, total_epochs(cell.run), tuple(sorted(needed))))
    for cell in cells:
        reference = reference_of(cell, cells)
        if reference is None:
            continue
        needs = tuple(training[one.folder] for one in (reference, cell) if one.folder in training)
        if needs or not (cell.folder / NEVER_POISONED).exists():
            work = partial(try_never_poisoned, reference, cell)
            jobs.append(Job(cell.trial, work, cell.folder, None, needs))
    return jobs


def _first(cell: Cell, cells: Sequence[Cell]) -> list[RunSpec]:
    """Runs to be finished before the cell: what it starts from, and what its attacks look into.

    What such attacks prepare (minutes for an optimised patch) is made once, by the undefended cell of the group.
    """
    start, surrogate = start_of(cell.run), surrogate_of(cell.run)
    first = [run for run in (start, surrogate) if run is not None]
    if surrogate is not None:
        here = (cell.group.label, UNDEFENDED, cell.seed)
        first += [one.run for one in cells if (one.group.label, one.defense.label, one.seed) == here]
    return first


def _line(name: str, cell: dict[str, Any]) -> str:
    rates = "  ".join(f"{attack} {rate['asr']:.1%}" for attack, rate in cell["attacks"].items())
    return f"{name}:  top-1 {cell['metrics']['acc1']:.1%}  {rates}  {cell['seconds']:,.0f} s"
