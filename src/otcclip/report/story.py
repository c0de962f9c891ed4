"""The headline: what the attacks did undefended, what was left of them, what it cost. Computed, never chosen.

It says so when the attack was too weak to be a test, when the defence lost, and when a low rate only means
that the model learned nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from otcclip.report.images import changed_box
from otcclip.report.records import UNDEFENDED, Rate, Result, Run, Shot
from otcclip.report.words import clean, percent

IS_A_TEST = 0.8  # undefended ASR below this says nothing about a defence
STOPPED = 0.01
LOST = 0.5  # of the undefended rate
LOOKED_AT = 32  # gallery images a trigger's size is measured on


@dataclass(frozen=True)
class Piece:
    """Words in one tone: "", "bad", "good" or "strong"."""

    text: str
    tone: str = ""


Sentence = list[Piece]


@dataclass(frozen=True)
class Story:
    """`sentences[0]` is the headline; `warnings` are what a reader must know before believing it."""

    sentences: list[Sentence]
    warnings: list[str]


@dataclass(frozen=True)
class AttackWords:
    """An attack as the gallery shows it: `subject` of a sentence, and whether it needs a trigger at all."""

    subject: str
    target: str
    targeted: bool


def describe(run: Run, attack: str) -> AttackWords:
    """What `attack` looks like, measured on the test images themselves with and without the trigger."""
    shots = [s for d in run.defenses for s in d.gallery if s.attack == attack]
    targets = {shot.target for shot in shots}
    target = f"“{clean(targets.pop(), 60)}”" if len(targets) == 1 else "the attacker’s class"
    changed, looked_at = _extent(shots[:LOOKED_AT])
    if looked_at and changed is None:
        return AttackWords("", target, targeted=True)
    if changed is None:
        return AttackWords(f"the trigger of {clean(attack, 40)}", target, targeted=False)
    width, height, whole_width, whole_height = changed
    if width * height > whole_width * whole_height / 2:
        return AttackWords("a pattern over the whole image", target, targeted=False)
    return AttackWords(f"a patch of {width}×{height} pixels", target, targeted=False)


def _extent(shots: list[Shot]) -> tuple[tuple[int, int, int, int] | None, bool]:
    """The largest box any trigger changed, and whether there was anything to compare."""
    pairs = [(shot.clean_image.read(), shot.image.read()) for shot in shots]
    boxes = [box for before, after in pairs if (box := changed_box(before, after))]
    return max(boxes, default=None, key=lambda b: b[0] * b[1]), any(a and b for a, b in pairs)


def rate_words(rate: Rate, targeted: bool) -> str:
    return f"{rate.hits} of {rate.n}" if targeted else percent(rate.asr)


def verdict(undefended: Result | None, defended: Result, attack: str) -> str:
    """What became of `attack`, in a word: untested, not a test, lost, learned little, weakened or stopped."""
    if undefended is None or attack not in undefended.attacks:
        return "untested"
    before, after = undefended.attacks[attack].asr, defended.attacks[attack].asr
    if before < IS_A_TEST:
        return "not a test"
    if after >= LOST * before:
        return "lost"
    if learned_little(undefended, defended):
        return "learned little"
    return "stopped" if after <= STOPPED else "weakened"


def learned_little(undefended: Result, defended: Result) -> bool:
    """Whether a low attack success rate only means that there is little in the model to fool."""
    return defended.top1 < LOST * undefended.top1


_TAIL = {
    "lost": ": the defence lost.",
    "weakened": ": weakened, not stopped.",
    "learned little": ", but it learned little.",
    "not a test": ". Too weak an attack to be a test.",
}
_TONE = {"stopped": "good", "lost": "bad", "weakened": "bad"}


def _attack_sentence(name: str, words: AttackWords, undefended: Result | None, after: Result | None) -> Sentence:
    before = undefended.attacks.get(name) if undefended else None
    sentence: Sentence = []
    if before is not None:
        rate = Piece(rate_words(before, words.targeted), "bad")
        if words.targeted:
            sentence = [Piece("Undefended, "), rate, Piece(f" targeted images are read as {words.target}.")]
        else:
            end = Piece(f" of the test images into {words.target}.")
            sentence = [Piece(f"Undefended, {words.subject} turns "), rate, end]
    if after is None or name not in after.attacks:
        return sentence
    found = after.attacks[name]
    outcome = verdict(undefended, after, name)
    shown = Piece(rate_words(found, words.targeted), _TONE.get(outcome, "strong"))
    if before is None:
        what = "targeted images" if words.targeted else "the test images"
        middle = f" {what} are read as {words.target}" if words.targeted else f" of {what} into {words.target}"
        lead = f"With {clean(after.defense, 40)}, " + ("" if words.targeted else f"{words.subject} turns ")
        return [Piece(lead), shown, Piece(middle + ".")]
    tail = _TAIL.get(outcome, ".")
    return [*sentence, Piece(f" With {clean(after.defense, 40)}: "), shown, Piece(tail)]


def _accuracy_sentence(before: Result | None, after: Result | None) -> Sentence:
    if before is None and after is None:
        return []
    if after is None or before is None:
        only = after or before
        assert only is not None
        name = "undefended" if only.defense == UNDEFENDED else f"with {clean(only.defense, 40)}"
        return [Piece(f"Top-1 accuracy {name}: "), Piece(percent(only.top1), "strong"), Piece(".")]
    points = 100 * (after.top1 - before.top1)
    gap = "no difference" if abs(points) < 0.05 else f"{abs(points):.1f} points {'more' if points > 0 else 'less'}"
    tone = "bad" if learned_little(before, after) else "strong"
    return [
        Piece(f"Top-1 accuracy with {clean(after.defense, 40)}: "),
        Piece(percent(after.top1), tone),
        Piece(f" against {percent(before.top1)} undefended ({gap})."),
    ]


def _warnings(run: Run, before: Result | None, after: Result | None) -> list[str]:
    lines = []
    if before is None:
        lines.append("There is no undefended run here, so whether these attacks work at all is not known.")
    for name, rate in (before.attacks if before else {}).items():
        if rate.asr < IS_A_TEST:
            lines.append(
                f"{clean(name, 40)} is not a test: undefended it succeeds on {percent(rate.asr)}, under the "
                f"{percent(IS_A_TEST, 0)} an attack must reach before a defence’s number means anything."
            )
    if before and after and learned_little(before, after):
        lines.append(
            f"{clean(after.defense, 40)} learned little: a model at {percent(after.top1)} top-1 is hard to "
            "fool, so its attack success rates say nothing for the defence."
        )
    if after is None:
        lines.append("No defence was run.")
    if len({r.seed for r in run.results}) > 1:
        shown = after or before
        lines.append(f"The headline is seed {shown.seed if shown else 0}; the table has every seed.")
    return lines


def tell(run: Run) -> Story:
    """The headline of a run."""
    before, after = run.result(UNDEFENDED), run.defended()
    sentences = [_attack_sentence(name, describe(run, name), before, after) for name in run.attacks]
    sentences.append(_accuracy_sentence(before, after))
    return Story([s for s in sentences if s], _warnings(run, before, after))
