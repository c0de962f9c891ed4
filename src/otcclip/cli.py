"""The command line: every verb, and one line with exit code 2 for every user error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import tyro

from otcclip import __version__
from otcclip.commands.bench import bench
from otcclip.commands.corpus import corpus_emoji, corpus_fashion_mnist, corpus_openclipart
from otcclip.commands.demo import demo
from otcclip.commands.evaluate import evaluate
from otcclip.commands.poison import poison
from otcclip.commands.repair import repair
from otcclip.commands.report import report
from otcclip.commands.scan import scan
from otcclip.commands.train import train
from otcclip.errors import UserError

COMMANDS: Mapping[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "evaluate": evaluate,
    "bench": bench,
    "poison": poison,
    "scan": scan,
    "repair": repair,
    "report": report,
    "corpus emoji": corpus_emoji,
    "corpus openclipart": corpus_openclipart,
    "corpus fashion-mnist": corpus_fashion_mnist,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name)(command)
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments == ["--version"]:
        print(f"otcclip {__version__}")
        return 0
    if " ".join(arguments[:2]) in COMMANDS:
        arguments = [" ".join(arguments[:2]), *arguments[2:]]
    return guarded(
        lambda: app.cli(
            prog="otcclip",
            description="Train CLIP on image-caption pairs you do not trust. --version alone prints the version.",
            args=arguments,
        )
    )


def guarded(action: Callable[[], object]) -> int:
    """Run what a user asked for; returns the exit code: 2 and one line where it is his to mend."""
    try:
        action()
    except UserError as error:
        print(f"otcclip: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what no command foresaw: no permission, a name too long, a disk that went away
        print(f"otcclip: {error.filename!a}: {error.strerror or error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError:
        print("otcclip: a name that is not UTF-8; rename it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("otcclip: stopped; the same command goes on (scan --resume, train --resume latest)", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
