"""Which images the page shows, and what it says beside each. Chosen by a hash of the key, not by looks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from otcclip.report.images import Album
from otcclip.report.records import HOUSE_DEFENSE, NEVER_POISONED, UNDEFENDED, JudgedPair, Run, Shot
from otcclip.report.story import AttackWords, describe, verdict
from otcclip.report.words import clean, percent

SAMPLE = 18  # test images of an attack, whatever came of them
FAILURES = 12  # more of them: where a defence was fooled
FIRST, MORE = 12, 36  # training pairs of a group: at once, and behind "show more"


@dataclass(frozen=True)
class Say:
    """What one model says of a test image; `state` is fooled, right or wrong."""

    defense: str
    prediction: str
    confidence: str
    state: str


@dataclass(frozen=True)
class TestTile:
    image: str | None
    true_name: str
    target: str
    says: list[Say]


@dataclass(frozen=True)
class AttackView:
    """One attack's test images: a sample, and those that fooled a defence (as far as there is room)."""

    name: str
    words: AttackWords
    total: int
    sample: list[TestTile]
    failures: list[TestTile]
    failed: int


@dataclass(frozen=True)
class PairTile:
    image: str | None
    caption: str
    original_caption: str
    new_caption: str
    action: str
    suspicion: str
    attack: str
    true_name: str
    copies: int


@dataclass(frozen=True)
class PairGroup:
    """Training pairs with one fate; `first` and `more` together may be fewer than `total`."""

    title: str
    total: int
    first: list[PairTile]
    more: list[PairTile]


@dataclass(frozen=True)
class PairView:
    """What one defence did with the training pairs. `leaked` is `None` where no ground truth is known."""

    defense: str
    groups: list[PairGroup]
    leaked: PairGroup | None


@dataclass(frozen=True)
class Example:
    """One image without and with the trigger, and what the models make of it, beside the headline."""

    before: str | None
    after: str | None
    true_name: str
    clean_prediction: str
    says: list[Say]


def _order(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _say(defense: str, shot: Shot) -> Say:
    state = "fooled" if shot.fooled else "right" if shot.right else "wrong"
    return Say(clean(defense, 40), clean(shot.prediction, 60), percent(shot.confidence, 0), state)


def _by_key(run: Run, attack: str) -> dict[str, dict[str, Shot]]:
    """key → defence → shot, in the order images are shown."""
    found: dict[str, dict[str, Shot]] = {}
    for defense in run.defenses:
        for shot in defense.gallery:
            if shot.attack == attack:
                found.setdefault(shot.key, {})[defense.name] = shot
    return {key: found[key] for key in sorted(found, key=_order)}


def _test_tile(shots: dict[str, Shot], album: Album) -> TestTile:
    first = next(iter(shots.values()))
    says = [_say(name, shot) for name, shot in shots.items()]
    return TestTile(album.uri(first.image.read()), clean(first.true_name, 60), clean(first.target, 60), says)


def attack_views(run: Run, album: Album) -> list[AttackView]:
    """The test images of every attack the galleries hold."""
    names = list(dict.fromkeys(shot.attack for d in run.defenses for shot in d.gallery))
    views = []
    for name in names:
        shots = list(_by_key(run, name).values())
        failed = [s for s in shots[SAMPLE:] if any(s[d].fooled for d in s if d not in (UNDEFENDED, NEVER_POISONED))]
        views.append(
            AttackView(
                clean(name, 40),
                describe(run, name),
                len(shots),
                [_test_tile(s, album) for s in shots[:SAMPLE]],
                [_test_tile(s, album) for s in failed[:FAILURES]],
                len(failed),
            )
        )
    return views


def example(run: Run, album: Album) -> Example | None:
    """The first image whose trigger fools the undefended model.

    One the defence gets right is preferred only where the defence stopped the attack: beside a headline that
    says it did not, such a picture would flatter it.
    """
    best: dict[str, Shot] | None = None
    house = run.defended()
    for name in run.attacks:
        if describe(run, name).targeted:
            continue
        fooled = [s for s in _by_key(run, name).values() if UNDEFENDED in s and s[UNDEFENDED].fooled]
        named = [s for s in fooled if s[UNDEFENDED].clean_prediction == s[UNDEFENDED].true_name] or fooled
        won = house and name in house.attacks and verdict(run.result(UNDEFENDED), house, name) == "stopped"
        saved = [s for s in named if won and house and house.defense in s and s[house.defense].right]
        best = best or next(iter(saved or named), None)
    if best is None:
        return None
    shot = best[UNDEFENDED]
    shown = {d: s for d, s in best.items() if d in (UNDEFENDED, HOUSE_DEFENSE) or (house and d == house.defense)}
    return Example(
        album.uri(shot.clean_image.read()),
        album.uri(shot.image.read()),
        clean(shot.true_name, 60),
        clean(shot.clean_prediction, 60),
        [_say(name, s) for name, s in shown.items()],
    )


def _pair_tile(pair: JudgedPair, copies: int, run: Run, album: Album) -> PairTile:
    original = (run.poison or {}).get(pair.key, "") if pair.attack else ""
    return PairTile(
        album.uri(pair.image.read()),
        clean(pair.caption, 160),
        clean(original, 160) if original != pair.caption else "",
        clean(pair.new_caption, 160),
        pair.action,
        "" if pair.suspicion is None else f"{pair.suspicion:.2f}",
        clean(pair.attack, 40),
        clean(pair.true_name, 60),
        copies,
    )


def _group(title: str, pairs: Iterable[JudgedPair], run: Run, album: Album) -> PairGroup:
    """Most suspicious first; copies of one image with one caption and one fate are one tile."""
    pairs = sorted(pairs, key=lambda p: (p.action != "re-pair", -(p.suspicion or 0.0), p.key))
    same: dict[tuple[bytes, str, str | None, str], list[JudgedPair]] = {}
    for pair in pairs:
        digest = hashlib.sha256(pair.image.read()).digest()
        same.setdefault((digest, pair.caption, pair.new_caption, pair.action), []).append(pair)
    tiles = [_pair_tile(c[0], len(c), run, album) for c in list(same.values())[: FIRST + MORE]]
    return PairGroup(title, len(pairs), tiles[:FIRST], tiles[FIRST:])


def pair_views(run: Run, album: Album) -> list[PairView]:
    """The training pairs of every defence that judges pairs, the headline's first."""
    known = run.poison is not None or any(r.poison_total for r in run.results)
    views = []
    house = run.defended()
    for defense in sorted(run.defenses, key=lambda d: house is None or d.name != house.defense):
        if defense.pairs is None:
            continue
        honest: Sequence[JudgedPair] = [p for p in defense.pairs if not p.attack]
        poison = [p for p in defense.pairs if p.attack]
        who = "Honest pairs" if known else "Pairs"
        groups = [
            _group("Poison caught", (p for p in poison if p.action != "keep"), run, album),
            _group(f"{who} given another caption", (p for p in honest if p.action == "re-pair"), run, album),
            _group(f"{who} held back", (p for p in honest if p.action == "hold-back"), run, album),
        ]
        leaked = _group("Poison that got through", (p for p in poison if p.action == "keep"), run, album)
        views.append(PairView(clean(defense.name, 40), [g for g in groups if g.total], leaked if known else None))
    return views
