"""`otcclip demo`."""

from __future__ import annotations

from pathlib import Path


def demo(
    hold_out: str = "twemoji",
    target: str = "banana",
    seed: int = 0,
    epochs: int = 16,
    out: Path = Path("runs/demo"),
    corpus: Path = Path("corpora/emoji"),
    defenses: tuple[str, ...] = ("clip", "otcclip"),
    clean_reference: bool = True,
) -> None:
    """Poison the emoji corpus, train with and without a defence, compare.

    Args:
        hold_out: style whose pictures are the test split.
        target: class that the backdoor's patch shall mean.
        seed: seeds weights, order, augmentation and poison.
        epochs: training epochs of each run.
        out: folder for results and the report; finished runs found there are reused.
        corpus: folder of the emoji corpus; built when it is not there.
        defenses: defences to compare, by name; an unknown one lists them.
        clean_reference: also train undefended on the pairs without poison.
    """
    from otcclip.demo import run_demo

    run_demo(
        out,
        corpus,
        hold_out=hold_out,
        target=target,
        seed=seed,
        epochs=epochs,
        chosen=defenses,
        reference=clean_reference,
    )
