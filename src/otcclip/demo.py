"""The main job, end to end: corpus, poison, training with and without a defence, one table and one page.

    otcclip demo --hold-out twemoji --target banana --seed 0 --epochs 16 --out runs/demo

Runs go side by side, one process and one thread each on a small machine. Whatever is finished is reused, whatever was
cut off goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from otcclip import attacks, defenses
from otcclip.data.atomic import write_json
from otcclip.data.emoji import build_emoji, check_style
from otcclip.data.emoji_spec import EMOJI
from otcclip.errors import UserError
from otcclip.models import open_clip_model_size
from otcclip.progress import console
from otcclip.registry import find
from otcclip.report import results_table, write_report
from otcclip.seeds import check_seed
from otcclip.training.experiment import RunSpec, check_free, clean_reference, make_setting, run_experiment, start_of
from otcclip.training.fleet import Job, cores, run_fleet
from otcclip.training.setting import total_epochs


def run_demo(
    out: Path,
    corpus: Path,
    *,
    hold_out: str = "twemoji",
    target: str = "banana",
    seed: int = 0,
    epochs: int = 16,
    chosen: Sequence[str] = ("clip", "otcclip"),
    reference: bool = True,
) -> list[dict[str, Any]]:
    """Build what is missing, run what is missing, write `results.json` and `report.html`; returns the results.

    Args:
        out: folder of the run. corpus: folder of the emoji corpus, built there when it is not.
        hold_out: style of the test split. target: class the backdoor argues for.
        chosen: defences to run, in this order, each once. reference: also train undefended on the same pairs without
            poison, for the attack rates of a model never poisoned and for the accuracy that a defence is to reach.

    Raises:
        UserError: an unknown defence, style or target, no defence, a seed or number of epochs out of range, a finished
            run of another demo in `out`, a package that cannot be had, a full disk.
    """
    chosen = tuple(dict.fromkeys(chosen))  # one named twice is one run
    for name in chosen:
        find("defence", defenses.DEFENSES, name)
    if not chosen:
        raise UserError("demo: name at least one defence")
    check_seed(seed)
    if epochs < 1:
        raise UserError(f"--epochs {epochs}: at least 1")
    check_style(hold_out, EMOJI.styles)  # before half a minute of building
    build_emoji(corpus, workers=cores())
    spec = RunSpec(str(corpus), str(out), "clip", hold_out=hold_out, target=target, seed=seed, epochs=epochs)
    specs = [replace(spec, defense=name) for name in chosen]
    if reference:
        specs.append(clean_reference(spec))
    for one in specs:
        check_free(one)  # before the ground truth of a finished demo is written over
    _write_ground_truth(spec, chosen)
    results = _run_all(specs)
    if reference:
        rates = {name: rate["asr"] for name, rate in results[-1]["attacks"].items()}
        results = [{**result, "clean_asr": rates} for result in results]
    write_json(out / "results.json", results)
    write_report(out)
    console.print(results_table(out))
    console.print(f"report: {out / 'report.html'}")
    return results


def _write_ground_truth(spec: RunSpec, chosen: Sequence[str]) -> None:
    """`poison.parquet` and `run.json`; fails here, in one line, before any training starts."""
    out = Path(spec.out)
    size = open_clip_model_size(spec.model)
    setting = make_setting(spec, size)
    attacks.write_records(out / "poison.parquet", setting.records)
    settings = {
        "corpus": "emoji",
        "hold_out": setting.split.hold_out,
        "left_out": list(setting.split.left_out),
        "target": spec.target,
        "seed": spec.seed,
        "epochs": spec.epochs,
        "defenses": list(chosen),
        "attacks": list(spec.attacks),
        "image_size": size,
        "model": spec.model,
        "batch_size": spec.batch_size,
        "lr": spec.lr,
        "train_pairs": len(setting.train),
        "test_images": len(setting.split.test),
        "versions": {name: version(name) for name in ("otcclip", "torch", "open_clip_torch", "numpy")},
    }
    write_json(out / "run.json", settings)


def _run_all(specs: Sequence[RunSpec]) -> list[dict[str, Any]]:
    """Run the specs side by side behind a progress bar each; the first error ends them all."""
    workers = min(cores(), len(specs))
    specs = [replace(spec, threads=max(1, cores() // workers)) for spec in specs]
    # The longest runs start first: an idle core at the end is time lost.
    ordered = sorted(specs, key=lambda spec: spec.defense == "clip")
    done = run_fleet([_job(spec, ordered) for spec in ordered], workers, on_epoch=_announce)
    return [done[spec.folder.name] for spec in specs]


def _job(spec: RunSpec, specs: Sequence[RunSpec]) -> Job:
    start = start_of(spec)
    after = tuple(other.folder.name for other in specs if start is not None and other.folder == start.folder)
    return Job(spec.folder.name, partial(run_experiment, spec), spec.folder, total_epochs(spec), after)


def _announce(job: Job, line: dict[str, Any]) -> None:
    """Print an evaluated epoch."""
    if "top1" in line:
        rates = "  ".join(f"{a} ASR {r['asr']:.1%}" for a, r in line["attacks"].items())
        head = f"{job.name:>14}  epoch {line['epoch'] + 1:>2}  top-1 {line['top1']:.1%}"
        # One line an epoch also where a log file is 80 columns wide.
        console.print(f"{head}  {rates}  {line['seconds']:.0f} s", soft_wrap=True)
