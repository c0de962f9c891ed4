"""What the recipes share: a spec with its provenance, printed, estimated, cut short, run.

python recipes/cc3m_rn50.py --train-data "cc3m/{00000..00331}.tar" --dry-run
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from otcclip.data.decode import printable
from otcclip.errors import UserError
from otcclip.training.train_spec import TrainSpec

OWN = ("train_data", "limit")  # what a recipe's command line takes by itself
DECIDING = ("model", "pretrained", "defense", "batch_size", "epochs", "lr", "wd", "warmup", "precision")


@dataclass(frozen=True)
class Recipe:
    """A named run.

    Attributes:
        doc: the recipe's docstring.
        spec: settings; `train_data` is a place to fill in.
        pairs: how many pairs the full data set has.
        processes: GPUs it is meant for.
        public: settings that the paper states. Whatever else differs from `TrainSpec`'s defaults is ours.
    """

    doc: str
    spec: TrainSpec
    pairs: int
    processes: int
    public: Mapping[str, str]

    def table(self) -> list[str]:
        """A line a setting, those that decide a run and those that are no defaults: its value, and whose it is."""
        plain = {field.name: field.default for field in fields(TrainSpec)}
        values = {name: getattr(self.spec, name) for name in plain}
        chosen = {name: value for name, value in values.items() if name in DECIDING or value != plain[name]}
        return [
            f"{name:<14}{printable(str(value)):<44}{self.public.get(name, 'ours')}" for name, value in chosen.items()
        ]


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """The command line of a recipe; returns its exit code."""
    parser = argparse.ArgumentParser(description=recipe.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", default=recipe.spec.train_data)
    parser.add_argument("--dry-run", action="store_true", help="print settings, steps, memory and cost; train nothing")
    parser.add_argument("--limit", type=int, help="take the first so many pairs")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="any other setting of otcclip train")
    arguments = parser.parse_args(argv)
    try:
        changes = _changes(arguments.set)
        spec = replace(recipe.spec, train_data=arguments.train_data, limit=arguments.limit, **changes)
        spec.check()
        if arguments.dry_run:
            return _print(replace(recipe, spec=spec))
        from otcclip.training.run import train

        train(spec)
    except UserError as error:
        print(f"otcclip: {error}", file=sys.stderr)
        return 2
    return 0


def _print(recipe: Recipe) -> int:
    from otcclip.training.cost import estimate

    pairs = min(recipe.pairs, recipe.spec.limit or recipe.pairs)
    processes = int(os.environ.get("WORLD_SIZE", recipe.processes))
    batch = recipe.spec.global_batch(processes)
    print("\n".join(recipe.table()))
    print(f"{'global batch':<14}{batch:,} over {processes} processes")
    print("\n".join(estimate(recipe.spec, pairs, processes).lines()))
    return 0


def _changes(settings: Sequence[str]) -> dict[str, Any]:
    """`name=value` read by the setting's type; an empty value is none. Names as on the command line or in Python."""
    known = {field.name: field for field in fields(TrainSpec)}
    out: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in known:
            raise UserError(f"--set {setting!r}: expected NAME=VALUE with a setting of otcclip train")
        if name in OWN:
            raise UserError(f"--set {setting!r}: has an option of its own, --{name.replace('_', '-')}")
        kind = str(known[name].type)
        try:
            if not text and kind.endswith("None"):
                out[name] = None
            elif kind.startswith("bool"):
                out[name] = {"true": True, "false": False}[text.lower()]
            elif kind.startswith("int"):
                out[name] = int(text)
            else:
                out[name] = float(text) if kind.startswith("float") else text
        except (KeyError, ValueError):
            raise UserError(f"--set {setting!r}: {name} is a {kind}") from None
    return out
