"""The command line: the only place that parses arguments. Every user error is one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from otcclip.errors import UserError


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
        defenses: defences to compare: clip, otcclip-paper, otcclip.
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


def corpus_emoji(out: Path = Path("corpora/emoji"), hold_out: str = "twemoji") -> None:
    """Build the emoji corpus: ten styles from their npm packages, as WebDataset shards.

    Args:
        out: folder to build it in; a complete corpus there is reused.
        hold_out: style of the default test split.
    """
    from otcclip.data.emoji import build_emoji

    corpus = build_emoji(out, hold_out=hold_out)
    print(corpus)


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


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    app = tyro.extras.SubcommandApp()
    app.command(demo)
    app.command(report)
    app.command(name="corpus emoji")(corpus_emoji)
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:2] == ["corpus", "emoji"]:
        arguments = ["corpus emoji", *arguments[2:]]
    try:
        app.cli(prog="otcclip", description=__doc__, args=arguments)
    except UserError as error:
        print(f"otcclip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("otcclip: stopped; the same command goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
