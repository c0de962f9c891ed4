"""What an image's look-alikes say of its caption, against a fixed reference: `evidence.neighbours`, a shard at a time.

Two kinds of look-alikes, each by its own vote: alike to the encoder (`look_alikes`), and alike to nobody who was
trained (`untrained_vote`, the very rule of training: sixteen voters, the worst of thirteen views). An enemy who fools
the one with a trigger that fills the image does not fool the other.

How the encoder's constants were chosen, without any poison label: on the emoji corpus a tenth of the captions were
shuffled by ourselves, and the choice is what tells those from the rest best (AUROC .944 for 64 voters at sharpness .1
and the mean of logs over the views; .921 for the 16 and .05 that the untrained descriptor uses, .932 for the worst
view). docs/scan.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from scipy import sparse
from torch import Tensor

from otcclip.detectors.base import PairFeatures, take_rows
from otcclip.detectors.claims import claims
from otcclip.detectors.matching import match
from otcclip.detectors.poll import Electorate, Vote, electorate, poll, share
from otcclip.detectors.views import encoder_views, picture_views
from otcclip.evidence import neighbours
from otcclip.evidence.captions import LIKE, agreement_table
from otcclip.evidence.votes import SHARPNESS as LOOKS_SHARPNESS

NEIGHBOURS = 64
SHARPNESS = 0.1  # cosine difference at which a voter's weight falls by e


@dataclass(frozen=True)
class LookAlikes:
    """The vote on `n` pairs of what is alike to the encoder.

    Attributes:
        own: `[n]` in (0, 1], share of the captions asked about that the voters like at least as well as the own one,
            joined over the views.
        nominee: `[n]` int64 into the reference's distinct captions: what else may fit. The encoder's nearest where it
            can tell (`matching`), else what the voters like best, of those that say something else than its own.
        nominee_share: `[n]`, as `own`, of the nominee.
        nominee_place: `[n]`, its place among the captions asked about: 1 is liked best in every view, ties count half.
    """

    own: Tensor
    nominee: Tensor
    nominee_share: Tensor
    nominee_place: Tensor


def look_alikes(features: PairFeatures) -> LookAlikes:
    """Ask the reference (computed once)."""
    return features.once("look-alikes", lambda: features.known(look_alikes, take_rows) or _ask(features))


def _ask(features: PairFeatures) -> LookAlikes:
    voting, words, own = electorate(features.against), features.words, features.kind_there
    best = match(features).best if features.joint else None
    parts = []
    mine, theirs = encoder_views(features), encoder_views(features.against)
    silent = claims(features).silent_to_encoder
    for rows, votes in poll(features, mine, theirs, silent, NEIGHBOURS, SHARPNESS):
        nominee = _favourite(votes[0], own[rows], words[rows], voting) if best is None else best[rows]
        seconded = joined([share(vote, voting.words[nominee.numpy()], voting) for vote in votes])
        own_share = joined([share(vote, words[rows], voting) for vote in votes])
        parts.append(LookAlikes(own_share, nominee, seconded, seconded * len(voting.asked)))
    return LookAlikes(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LookAlikes)))


def joined(shares: list[Tensor]) -> Tensor:
    """Geometric mean over the views: what bears a caption out in one view of ten counts a tenth."""
    return torch.stack(shares).log().mean(dim=0).exp()


def _favourite(vote: Vote, own: Tensor, words: sparse.csr_array, voting: Electorate) -> Tensor:
    """What the voters like best among the captions asked about, of those unlike the own one, in words `[r, v]`."""
    like = torch.from_numpy(agreement_table(words, voting.words[voting.asked.numpy()])) >= LIKE
    return voting.asked[vote.liked.masked_fill(like | (voting.asked == own[:, None]), -1.0).argmax(dim=1)]


@dataclass(frozen=True)
class Untrained:
    """The vote on `n` pairs of what looks alike.

    Attributes:
        own: `[n]` as in `LookAlikes`, in the worst view.
        nominee_place: `[n]`, the place of the encoder's look-alikes' nominee, as there, in the worst view.
        voters: `[n, v, k]` int32, in each view.
    """

    own: Tensor
    nominee_place: Tensor
    voters: Tensor


def untrained_vote(features: PairFeatures) -> Untrained:
    """Ask the reference (computed once).

    Raises:
        ValueError: the features were kept without pictures.
    """

    def make() -> Untrained:
        if (known := features.known(untrained_vote, take_rows)) is not None:
            return known
        voting, words = electorate(features.against), features.words
        mine, theirs = picture_views(features), picture_views(features.against)
        parts: list[Untrained] = []
        silent, nominees = claims(features).silent, look_alikes(features).nominee.numpy()
        for rows, votes in poll(features, mine, theirs, silent, neighbours.NEIGHBOURS, LOOKS_SHARPNESS):
            own, nominee = (
                torch.stack([share(vote, asked, voting) for vote in votes]).amax(dim=0)
                for asked in (words[rows], voting.words[nominees[rows]])
            )
            parts.append(
                Untrained(own, nominee * len(voting.asked), torch.stack([vote.voters for vote in votes], dim=1).int())
            )
        return Untrained(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Untrained)))

    return features.once("untrained", make)
