"""One false word: how many of those who use a doubtful word lie by it, and how well a pair heard it.

`evidence.words` against a fixed reference. There nobody is believed who uses a doubtful word unheard; here a
probability is wanted. A caption with one false word is a lie that its true words vouch for, so the word is asked about:

* of the pairs that use it unheard as many as is usual for a word may be honest. What is beyond that is lies;
* an image that has nothing to do with the word hears it by chance, the more often the more pairs use it. How often the
  images whose captions do not use it hear it as well as this one does is a p-value (the vote's rules hold: the worst
  view counts, and who makes the same claim has no vote).

`detectors.evidence` makes odds of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otcclip.detectors.base import PairFeatures, take_rows
from otcclip.detectors.look_alikes import untrained_vote
from otcclip.detectors.poll import electorate
from otcclip.evidence.words import NONE, Hearsay, hearsay, times_heard, word_table


@dataclass(frozen=True)
class Doubt:
    """Of `n` pairs, for each of at most `l` words of a caption.

    Attributes:
        word: `[n, l]` int64, the doubtful words that say much (`CaptionAgreement.names`), `NONE` in other places.
        false: `[n, l]` float64, share of lies among the other pairs of the reference to which the word says much.
        heard: `[n, l]` float64 in (0, 1], share of the reference's pairs without the word whose look-alikes use it at
            least as often, in the worst view.
    """

    word: Tensor
    false: Tensor
    heard: Tensor


def doubt(features: PairFeatures) -> Doubt:
    """Look at every pair's words (computed once).

    Raises:
        ValueError: the features were kept without pictures.
    """
    return features.once("doubt", lambda: features.known(doubt, take_rows) or _doubt(features))


@dataclass(frozen=True)
class _Spoken:
    """The reference's `words [u, l]` by distinct caption, `kind [m]`, what is known of them, and `chance [v, k + 1]`:
    the share of pairs without a doubtful word whose look-alikes use it at least so many times."""

    words: Tensor
    kind: Tensor
    heard: Hearsay
    chance: Tensor


def _spoken(against: PairFeatures) -> _Spoken:
    def make() -> _Spoken:
        voting, voters = electorate(against), untrained_vote(against).voters
        (words, much), kind = word_table(voting.words), voting.kind
        lacking = much[kind] & (_times(words[kind], much[kind], words, kind, voters) == 0)
        heard = hearsay(words, much, kind, lacking, voters.transpose(0, 1))
        return _Spoken(words, kind, heard, _chance(words, kind, heard.doubted, voters))

    return against.once("spoken", make)


def _chance(words: Tensor, kind: Tensor, doubted: Tensor, voters: Tensor) -> Tensor:
    """`[v, k + 1]` float64, ones for words that nobody doubts; who asks counts himself, so that none is 0."""
    out = torch.ones(len(doubted), voters.shape[2] + 1, dtype=torch.float64)
    votes = voters.long()
    for word in torch.nonzero(doubted)[:, 0].tolist():
        uses = (words == word).any(dim=1)[kind]
        times = uses[votes].sum(dim=2).amin(dim=1)[~uses]
        at_least = torch.bincount(times, minlength=out.shape[1]).flip(0).cumsum(0).flip(0)
        out[word] = (at_least + 1) / (len(times) + 1)
    return out


def _doubt(features: PairFeatures) -> Doubt:
    there, voters = _spoken(features.against), untrained_vote(features).voters
    words, much = word_table(features.words)
    known, place = there.heard, words.clamp(min=0)
    asked = much & (words != NONE) & known.doubted[place]
    inside, alone = _itself(features, asked)
    users = known.weighty[place] - inside.long()
    beyond = known.unheard[place] - alone.long() - known.usual
    false = (beyond / users.clamp(min=1)).clamp(0, 1).double()
    heard = there.chance[place, _times(words, asked, there.words, there.kind, voters)]
    return Doubt(words.where(asked, NONE), false.where(asked, 0.0), heard.where(asked, 1.0))


def _itself(features: PairFeatures, asked: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, l]` bool twice: words asked about that a pair of the reference counts among its own there, and those of them
    that it uses unheard. Nobody is on his own record; whose caption was changed since stands there as another."""
    known, at = _spoken(features.against).heard.lacking, features.record_index
    inside = asked & (at >= 0)[:, None]
    width = min(asked.shape[1], known.shape[1])
    lacking = torch.zeros_like(asked)
    lacking[:, :width] = known[at, :width]
    return inside, inside & lacking


def _times(words: Tensor, asked: Tensor, spoken: Tensor, kind: Tensor, voters: Tensor) -> Tensor:
    """`[n, l]` int64: how many of a pair's look-alikes, `voters [n, v, k]`, use each word asked about, in the worst
    view; of what the reference says, `spoken [u, l]` by distinct caption `kind [m]`, nothing is left out."""
    silent, most = torch.zeros(len(kind), spoken.shape[1], dtype=torch.bool), voters.shape[2]
    views = (votes.contiguous() for votes in voters.unbind(1))
    return torch.stack([times_heard(words, asked, spoken, silent, kind, votes, most) for votes in views]).amin(dim=0)
