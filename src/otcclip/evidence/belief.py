"""What is believed of pairs as evidence comes in: first what their look-alikes say, later what a model says.

Everything that `evidence` knows comes together here, and nothing that trains: who asks a model, when, and what follows
for training is the defence's business (`defenses.otcclip`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from otcclip.data.images import ImageSource
from otcclip.evidence.captions import caption_agreement
from otcclip.evidence.neighbours import Evidence, neighbour_evidence
from otcclip.evidence.trust import believed, by_diversity, in_measure, unusually_often, usually_vouched
from otcclip.evidence.votes import combined_p, p_value, share_without, support
from otcclip.evidence.words import rarely_unheard, words_of


@dataclass
class Belief:
    """Of `n` pairs under `u` distinct captions.

    Attributes:
        alpha: level of every decision: the expected share of wrong pairs among those believed under a caption, at most.
        tokens: `[u, context]` int64. caption_of: `[n]` int64.
        own, outside, by_chance, copies, unheard, doubtful, voters, weight: of `neighbours.Evidence`; who is of a crowd
            or in a closed circle that nobody outside bears out has no vote, and for `own` the crowd's verdict, or what
            is heard outside of the circle, if that is more; `own` grows where votes fall away.
        suspect: `[n]` bool, pairs of such crowds, in circles and under closed captions.
        place: `[n]` int64, in the order of `by_diversity`.
        suspicion: `[n]` the p-value that counts now.
        unwitnessed: `[n]` bool, pairs to which no model is a witness: crowds that nobody outside bears out (if it
            trained on one copy it has seen them all), and who was let go.
        closed: `[u]` bool, captions to which none is: where it spoke for unusually many (`usually_vouched`).
    """

    alpha: float
    tokens: Tensor
    caption_of: Tensor
    own: Tensor
    outside: Tensor
    by_chance: Tensor
    suspect: Tensor
    copies: Tensor
    unheard: Tensor
    doubtful: Tensor
    voters: Tensor
    weight: Tensor
    place: Tensor
    suspicion: Tensor
    unwitnessed: Tensor
    closed: Tensor

    @classmethod
    def gather(cls, images: Tensor | ImageSource, tokens: Tensor, caption_of: Tensor, alpha: float) -> Belief:
        """Ask the look-alikes; arguments as for `neighbour_evidence`."""
        return cls.of(neighbour_evidence(images, tokens, caption_of), tokens, caption_of, alpha)

    @classmethod
    def of(cls, found: Evidence, tokens: Tensor, caption_of: Tensor, alpha: float) -> Belief:
        """What is believed of what the look-alikes said."""
        lies = found.verdict > alpha
        mute = lies | (found.encircled & (found.outside > alpha))
        silent = mute[found.voters.long()]
        weight = found.weight.masked_fill(silent, 0.0)
        rows = torch.nonzero(silent.any(dim=2).any(dim=0))[:, 0]  # nobody else has lost a voter
        heard = share_without(mute, rows, found.voters, weight, caption_of, found.agreement)
        own = found.own.clone()
        own[rows] = torch.maximum(own[rows], heard)
        own = torch.where(found.encircled, torch.maximum(own, found.outside), own)
        own = torch.where(lies, found.verdict, own)
        suspect = lies | found.encircled
        suspicion = (_alone(own, found.by_chance, suspect) * found.copies).clamp(max=1.0)
        place = by_diversity(found.vectors, caption_of, suspicion)
        closed = torch.zeros(len(tokens), dtype=torch.bool)
        known = (own, found.outside, found.by_chance, suspect, found.copies, found.unheard, found.doubtful)
        out = cls(alpha, tokens, caption_of, *known, found.voters, weight, place, suspicion, lies, closed)
        out.agreement, out.words = found.agreement, found.words  # both follow from the tokens; here they are at hand
        return out

    def state_dict(self) -> dict[str, Any]:
        """What `Belief(**state)` makes another of."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def agreement(self) -> Tensor:
        """`[u, u]`, how alike the captions are."""
        return torch.from_numpy(caption_agreement(self.tokens))

    @cached_property
    def words(self) -> Tensor:
        """`[u, l]`, the captions' words."""
        return words_of(self.tokens)[0]

    def trusted(self) -> Tensor:
        """`[n]` bool: who is believed, word for word, and within the measure of his claim.

        Where unusually many pairs under one caption are believed, those outside must bear them out too.
        """
        candidates = believed(self.suspicion, self.caption_of, self.agreement, self.alpha) & ~self.doubtful
        often = unusually_often(candidates, self.caption_of)
        if bool(often.any()):
            p = torch.where(often, torch.maximum(self.suspicion, self.outside), self.suspicion)
            candidates &= believed(p, self.caption_of, self.agreement, self.alpha)
        candidates = rarely_unheard(candidates, self.suspicion, self.caption_of, self.words, self.unheard)
        return in_measure(candidates, self.place, self.suspicion, self.caption_of, self.agreement)

    def hear(self, rows: Tensor, share: Tensor, in_force: Tensor) -> tuple[Tensor, Tensor]:
        """A model speaks: `share [m]` of the captions are at least as near as their own to the pairs `rows [m]`.

        Args:
            rows: pairs that it never trained on under their captions. in_force: `[n]` bool, those that it trained on.

        Returns:
            `[n]` bool who is trusted now; `[n]` bool who of those in force is to be let go. The model trained on these
            and is no witness to them any more. Others in force keep the p-value that they came in with.
        """
        vouched = torch.zeros(len(self.caption_of), dtype=torch.bool)
        vouched[rows] = share <= self.alpha
        self._close(vouched)
        closed = self.closed[self.caption_of]
        # The share as it is: both witnesses look at the image, and Fisher's rule takes them for strangers.
        both = combined_p(self.own[rows], share)
        both = torch.where((self.unwitnessed | closed)[rows], self._alone()[rows], both)
        self.suspicion[rows] = (both * self.copies[rows]).clamp(max=1.0).float()
        trusted = self.trusted()
        leaves = in_force & closed & ~trusted
        self.unwitnessed |= leaves
        return trusted, leaves

    def _close(self, vouched: Tensor) -> None:
        """Under a claim that the model speaks for too readily only look-alikes count, and of those none whom only the
        model speaks for."""
        self.closed |= ~usually_vouched(vouched, self.caption_of, self.agreement)
        closed = self.closed[self.caption_of]
        rows = torch.nonzero(closed)[:, 0]
        silent = vouched & closed
        anew = share_without(silent, rows, self.voters, self.weight, self.caption_of, self.agreement)
        self.own[rows] = torch.maximum(self.own[rows], anew)
        self.suspect |= closed
        self.suspicion[rows] = (self._alone() * self.copies)[rows].clamp(max=1.0)

    def _alone(self) -> Tensor:
        """`[n]` p-values where look-alikes speak alone."""
        return _alone(self.own, self.by_chance, self.suspect)

    def seconded(self, rows: Tensor, asked: Tensor, caption: Tensor, in_force: Tensor) -> Tensor:
        """`[m]` bool: whether the look-alikes in force of the pairs `rows [m]`, under the captions `[n]` that they now
        have, bear out the captions `asked [m]`."""
        return support(self.voters[0][rows].long(), caption, in_force, asked, self.agreement) <= self.alpha


def _alone(own: Tensor, by_chance: Tensor, suspect: Tensor) -> Tensor:
    """P-values of shares `own`; of suspects the shares as they are, which are larger: they were heard by others than
    `by_chance` was drawn from, and have had their chance."""
    return torch.where(suspect, own, p_value(own, by_chance))
