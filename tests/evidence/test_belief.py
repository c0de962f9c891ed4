"""A claim that a model suddenly finds plausible: who stays, who goes, and on whose word."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from otcclip.evidence.belief import Belief
from otcclip.evidence.votes import combined_p

CAPTIONS, EACH, SIBLINGS = 400, 4, 20
HONEST = CAPTIONS * EACH
LEAK = HONEST  # the first sibling, which got through


@pytest.fixture
def belief() -> Belief:
    """Four honest pairs a caption, each other's look-alikes; and twenty false ones under caption 0, likewise.

    Look-alikes bear out the honest ones and one of the false.
    """
    size = HONEST + SIBLINGS
    caption_of = torch.cat([torch.arange(CAPTIONS).repeat_interleave(EACH), torch.zeros(SIBLINGS, dtype=torch.int64)])
    own = torch.full((size,), 0.001)
    own[LEAK + 1 :] = 0.9
    group = torch.arange(size) // EACH * EACH
    other = torch.stack([group + (torch.arange(size) + step) % EACH for step in range(1, EACH)], dim=1)
    tokens = torch.stack([torch.tensor([1000, 1 + word, 2000]) for word in range(CAPTIONS)])
    nobody = torch.zeros(size, dtype=torch.bool)
    return Belief(
        alpha=0.05,
        tokens=tokens,
        caption_of=caption_of,
        own=own,
        outside=torch.zeros(size),
        by_chance=torch.linspace(0, 1, 10_000),
        suspect=nobody.clone(),
        copies=torch.ones(size, dtype=torch.int64),
        unheard=nobody[:, None].clone(),
        doubtful=nobody.clone(),
        voters=other[None].int(),
        weight=torch.ones(1, size, EACH - 1),
        place=(torch.arange(size) != LEAK).long(),  # four pairs a caption are usual, and it is the first of its own
        suspicion=own.clone(),
        unwitnessed=nobody.clone(),
        closed=torch.zeros(CAPTIONS, dtype=torch.bool),
    )


def siblings_outside() -> Tensor:
    return torch.arange(LEAK + 1, HONEST + SIBLINGS)


def test_the_one_that_got_through_goes_and_the_honest_stay(belief: Belief) -> None:
    in_force = belief.trusted()
    assert in_force[LEAK] and in_force[:EACH].sum() == EACH - 1 and in_force[EACH:HONEST].all()
    trusted, leaves = belief.hear(siblings_outside(), torch.full((SIBLINGS - 1,), 0.001), in_force)
    assert torch.nonzero(belief.closed)[:, 0].tolist() == [0]
    assert torch.nonzero(leaves)[:, 0].tolist() == [LEAK], "its siblings alone had borne it out"
    assert trusted[:HONEST].all() and not trusted[LEAK:].any(), "and the model's word for them is worth nothing"
    assert belief.own[LEAK] == belief.suspicion[LEAK] == 1.0, "nobody is left to vote on it"
    assert (belief.suspicion[LEAK + 1 :] >= 0.9).all()
    assert torch.nonzero(belief.unwitnessed)[:, 0].tolist() == [LEAK]
    assert belief.suspect.equal(belief.caption_of == 0), "under a closed claim shares are taken as they are"


def test_a_closed_claim_stays_closed_and_its_evidence_does_not_come_back(belief: Belief) -> None:
    in_force = belief.trusted()
    _, leaves = belief.hear(siblings_outside(), torch.full((SIBLINGS - 1,), 0.001), in_force)
    again = Belief(**belief.state_dict())  # also after a resume
    outside = torch.cat([torch.tensor([LEAK]), siblings_outside()])
    trusted, more = again.hear(outside, torch.full((SIBLINGS,), 0.5), in_force & ~leaves)
    assert again.closed[0] and not more.any() and not trusted[LEAK:].any()
    assert again.own[LEAK] == 1.0


def test_a_model_that_speaks_for_as_many_as_usual_is_heard(belief: Belief) -> None:
    """One pair a caption is outside, and the model speaks for it."""
    belief.own[LEAK:] = belief.suspicion[LEAK:] = 0.9
    outside = torch.arange(0, HONEST, EACH)
    belief.own[outside] = belief.suspicion[outside] = 0.2
    in_force = belief.trusted()
    assert not in_force[outside].any()
    trusted, leaves = belief.hear(outside, torch.full((CAPTIONS,), 0.001), in_force)
    assert not belief.closed.any() and not leaves.any()
    assert trusted[outside].float().mean() > 0.99


def test_look_alikes_alone_are_judged_by_their_p_value_and_beside_a_model_by_their_share(belief: Belief) -> None:
    """Nobody is closed; a third of the outsiders is suspect and a third was let go, to whom the model is no witness."""
    belief.by_chance = torch.linspace(0, 2, 10_000)  # half of what fares as well
    outside = torch.arange(0, 30)
    belief.own[outside] = 0.3
    belief.suspect[10:20] = belief.unwitnessed[10:20] = True
    belief.unwitnessed[20:30] = True
    belief.hear(outside, torch.full((30,), 0.5), torch.zeros_like(belief.suspect))
    assert not belief.closed.any()
    got = belief.suspicion[outside]
    assert got[:10].tolist() == pytest.approx([float(combined_p(torch.tensor(0.3), torch.tensor(0.5)))] * 10)
    assert got[10:20].tolist() == pytest.approx([0.3] * 10) and got[20:].tolist() == pytest.approx(
        [0.15] * 10, rel=1e-3
    )


def test_look_alikes_in_force_second_a_caption(belief: Belief) -> None:
    """Of two asked about, the one that an image's look-alikes carry; and nobody where none is in force."""
    rows = torch.tensor([0, 0, 8])
    asked = torch.tensor([0, 5, 2])
    in_force = belief.trusted()
    assert belief.seconded(rows, asked, belief.caption_of, in_force).tolist() == [True, False, True]
    in_force[8:12] = False
    assert belief.seconded(rows, asked, belief.caption_of, in_force).tolist() == [True, False, False]
