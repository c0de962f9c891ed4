"""Attacks that look into a model: which those are, and what they prepare against it before they can be made.

Such an attack names its model in its spec (`surrogate=FOLDER`, `patch=FILE`) or leaves it to the run, whose `surrogate`
is then a finished run: the same attack is the same in every folder.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from otcclip import attacks
from otcclip.attacks import Attack, PoisonContext
from otcclip.attacks.surrogate import Surrogate
from otcclip.data.digest import file_digest
from otcclip.data.emoji_load import EmojiSplit
from otcclip.models.checkpoint import WEIGHTS
from otcclip.registry import find
from otcclip.specs import Spec, options_of, takes


def wants_model(specs: Iterable[Spec]) -> bool:
    """Whether any of the attacks looks into a model and names none."""
    return any(_wants(spec, option) for spec in specs for option in ("surrogate", "patch"))


def _wants(spec: Spec, option: str) -> bool:
    return takes(find("attack", attacks.ATTACKS, spec.name), option) and option not in spec


def file_digests(specs: Iterable[Spec]) -> dict[str, str]:
    """Of what the attacks' own files hold, by attack (its name in the run) and option: a patch, or the weights of a run
    that is looked into."""
    out = {}
    for spec in specs:
        given = options_of("attack", attacks.ATTACKS, spec)
        for option, inside in (("patch", "."), ("surrogate", WEIGHTS)):
            if given.get(option):
                out[f"{given.get('name', spec.name)} {option}"] = file_digest(Path(given[option]) / inside)
    return out


def with_patch(spec: Spec, split: EmojiSplit, surrogate: Surrogate | None, folder: Path | None, seed: int) -> Spec:
    """`spec` with the file of its optimised patch, made in `folder` (the surrogate's) if it is not there yet.

    Attacks without a patch are returned as they are, and so is one that has no surrogate: it says so itself. The file
    follows from model, spec and seed, so processes that make it at once make the same.
    """
    if surrogate is None or folder is None or not _wants(spec, "patch"):
        return spec
    path = folder / f"{spec.name}-{zlib.crc32(f'{spec} {seed}'.encode()):08x}.npy"
    if not path.exists():
        given = options_of("attack", attacks.ATTACKS, spec)
        context = PoisonContext.of(split.train, split.test, surrogate)
        size = {name: given[name] for name in ("size",) if name in given}
        find("attack", attacks.ATTACKS, spec.name).optimise(given["target"], context, path, seed=seed, **size)
    return spec.with_options(patch=path)


def plan_blindly(specs: Sequence[Spec], split: EmojiSplit, seed: int) -> None:
    """Plan attacks whose model is yet to be trained, as far as can be without it; nothing is kept.

    All are made, so that every option is looked at. A patch is stood in for by a grey one, and an attack whose plan
    asks the model by a plain backdoor of its target, count and name, which takes as many pairs from the same classes.

    Raises:
        UserError: an option out of range, two attacks of one name, a target that is no class, more poison than pairs.
    """
    with tempfile.TemporaryDirectory() as folder:
        patch = Path(folder) / "patch.npy"
        np.save(patch, np.full((3, 1, 1), 0.5, np.float32))
        made: list[Attack] = []
        for spec in specs:
            ready = spec.with_options(patch=patch) if _wants(spec, "patch") else spec
            attack = attacks.make(ready.name, **options_of("attack", attacks.ATTACKS, ready))
            if _wants(spec, "surrogate"):
                options = {name: getattr(attack, name) for name in ("target", "count", "name")}
                attack = attacks.make("badnets", **options)
            made.append(attack)
        attacks.make_plans(split.train, split.test, made, seed)
