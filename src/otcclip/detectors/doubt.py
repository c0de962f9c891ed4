"""Words on credit: whether a pair uses a word that most of those who use it use without any look-alike using it.

`evidence.words` against a fixed reference. There nobody is believed who uses a doubtful word unheard; here, where a
probability is wanted, the others who use the word so are its record (`detectors.evidence`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.detectors.base import PairFeatures, take_rows
from otcclip.detectors.look_alikes import untrained_vote
from otcclip.detectors.poll import electorate
from otcclip.evidence.words import NONE, Hearsay, hearsay, not_among, word_table


@dataclass(frozen=True)
class Doubt:
    """Of `n` pairs, for the most doubtful of the words that each uses unheard.

    Attributes:
        word: `[n]` int64, which it is (`CaptionAgreement.names`); `NONE` where there is none, and then nobody uses it.
        users: `[n]` int64, other pairs of the reference to which it says much.
        unheard: `[n]` int64, those of them that use it unheard.
    """

    word: Tensor
    users: Tensor
    unheard: Tensor


def doubt(features: PairFeatures) -> Doubt:
    """Look at every pair's words (computed once).

    Raises:
        ValueError: the features were kept without pictures.
    """
    return features.once("doubt", lambda: features.known(doubt, take_rows) or _doubt(features))


@dataclass(frozen=True)
class _Spoken:
    words: Tensor
    kind: Tensor
    heard: Hearsay


def _spoken(against: PairFeatures) -> _Spoken:
    """The reference's words, by distinct caption, and what is known of them."""

    def make() -> _Spoken:
        voting, voters = electorate(against), untrained_vote(against).voters
        (words, much), kind = word_table(voting.words), voting.kind
        nobody = torch.zeros(len(kind), words.shape[1], dtype=torch.bool)
        lacking = _lacking(words[kind], much[kind], words, nobody, kind, voters)
        return _Spoken(words, kind, hearsay(words, much, kind, lacking, voters.transpose(0, 1)))

    return against.once("spoken", make)


def _doubt(features: PairFeatures) -> Doubt:
    there, voters = _spoken(features.against), untrained_vote(features).voters
    words, much = word_table(features.words)
    heard = there.heard
    doubted = (words != NONE) & heard.doubted[words.clamp(min=0)]
    nobody = torch.zeros_like(heard.lacking)
    lacking = _lacking(words, much & doubted, there.words, nobody, there.kind, voters)
    lacking |= _lacking(words, doubted & ~lacking, there.words, heard.lacking, there.kind, voters)
    place = words.clamp(min=0)
    inside = ((features.self_index >= 0)[:, None] & much).long()
    users = torch.where(lacking, heard.weighty[place] - inside, 0)
    unheard = torch.where(lacking, heard.unheard[place] - inside, 0)
    worst = (unheard / users.clamp(min=1)).argmax(dim=1, keepdim=True)
    word = torch.where(users > 0, words, NONE)
    return Doubt(*(of.gather(1, worst)[:, 0] for of in (word, users, unheard)))


def _lacking(words: Tensor, asked: Tensor, spoken: Tensor, silent: Tensor, kind: Tensor, voters: Tensor) -> Tensor:
    """`[n, l]` bool: the words asked about that in some view no look-alike has."""
    out = torch.zeros_like(asked)
    for votes in voters.unbind(1):
        out |= not_among(words, asked & ~out, spoken, silent, kind, votes.contiguous())
    return out
