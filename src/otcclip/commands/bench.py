"""`otcclip bench`."""

from __future__ import annotations

from pathlib import Path


def bench(
    attacks: tuple[str, ...] = ("plain",),
    defenses: tuple[str, ...] = ("clip", "otcclip"),
    seeds: tuple[int, ...] = (0, 1, 2),
    poison_rate: tuple[float, ...] = (),
    utility: tuple[str, ...] = (),
    hold_out: str = "twemoji",
    target: str = "banana",
    epochs: int = 16,
    processes: int | None = None,
    clean_reference: bool = True,
    out: Path = Path("runs/bench"),
    corpus: Path = Path("corpora/emoji"),
) -> None:
    """Every attack against every defence: train the cross product, resumable cell by cell, and draw the matrix.

    Attacks and defences are written name[:option=value,...], such as badnets:count=45,target=guitar or
    otcclip:alpha=0.01.

    Args:
        attacks: groups of attacks; those joined by + share a poisoned corpus and so a training. "plain" and
            "adaptive" are the families of docs/attacks.md in two corpora and one, "none" is the corpus without poison.
        defenses: defences to train every group with; undefended clip is always among them.
        seeds: seeds of weights, order, augmentation and poison; three or more for any claim.
        poison_rate: plant every attack at these shares of the training pairs instead of its own count.
        utility: also measure finished models as users do: probe, retrieval, openclipart, fashion-mnist.
        hold_out: style whose pictures are the test split.
        target: class of the first attack of a group; the others draw one each.
        epochs: training epochs of each run.
        processes: cells trained at a time, one thread each; as many as there are cores by default.
        clean_reference: also train undefended on the pairs without poison.
        out: folder of the matrix; finished cells found there are reused.
        corpus: folder of the emoji corpus; built when it is not there.
    """
    from otcclip.bench import BenchSpec, run_bench

    spec = BenchSpec(
        corpus=str(corpus),
        out=str(out),
        attacks=attacks,
        defenses=defenses,
        seeds=seeds,
        hold_out=hold_out,
        target=target,
        epochs=epochs,
        poison_rates=poison_rate,
        reference=clean_reference,
        utility=utility,
    )
    run_bench(spec, processes)
