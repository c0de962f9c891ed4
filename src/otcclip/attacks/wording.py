"""Captions an adaptive attacker writes: the target's name among words that betray nothing.

The evidence (`otcclip.evidence`) weighs words by their rarity and gives all voters under one caption one vote. So a
caption of the target's name and some of the corpus's most frequent words agrees with every other such caption, and
counts as a caption of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from otcclip.attacks.context import evenly

FILLERS = 40


def words(caption: str) -> list[str]:
    """The caption's different words in lower case, in order."""
    return list(dict.fromkeys(re.findall(r"[^\W_][\w'’-]*", caption.lower())))


def frequency(captions: Sequence[str]) -> Counter[str]:
    """In how many of the different captions each word occurs, in an order that follows from the captions alone."""
    return Counter(word for caption in sorted(set(captions)) for word in words(caption))


def sentence(name: str, others: Sequence[str], captions: Sequence[str]) -> str:
    """`name` and other words as `captions` are written: `banana | fruit, yellow` where a name stands before a bar."""
    bars = sum(" | " in caption for caption in captions)
    return name + ((" | " if 2 * bars > len(captions) else ", ") + ", ".join(others) if others else "")


def paraphrases(name: str, captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions of `name` and one or two of the most frequent words of `captions`.

    All different while such words last; else each as often as any other, give or take one.
    """
    own = set(words(name))
    ranked = [word for word, _ in frequency(captions).most_common() if word not in own]
    fillers = max(FILLERS, int(np.sqrt(2 * count)) + 1)
    some = ranked[:fillers]
    choices = [(), *((word,) for word in some), *combinations(some, 2)]
    drawn = [choices[i] for i in evenly(len(choices), count, rng)]
    return [sentence(name, [chosen[i] for i in rng.permutation(len(chosen))], captions) for chosen in drawn]


def spread(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions out of the few given (`evenly`)."""
    return [captions[i] for i in evenly(len(captions), count, rng)]


def mixed(name: str, true: str, keep: int, captions: Sequence[str], known: Counter[str]) -> str:
    """`name` before the `keep` rarest words of the true caption: those by which its look-alikes would know it.

    `known`: `frequency(captions)`.
    """
    own = set(words(name))
    rarest = sorted((word for word in words(true) if word not in own), key=lambda word: known[word])[:keep]
    return sentence(name, rarest, captions)
