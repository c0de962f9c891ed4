"""Ranking by d against the whole pool, solved pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from otcclip.evidence import matching
from otcclip.evidence.matching import EPSILON, ITERATIONS, own_share, rank_captions
from otcclip.models.two_tower import Features
from otcclip.transport import FeatureSets, all_costs

N, U, D = 23, 17, 12


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(n: int = N) -> Features:
    return Features(unit(n, D, seed=0), FeatureSets.from_dense(unit(n, 9, D, seed=1)))


def captions(u: int = U) -> Features:
    """Ragged: one to six tokens."""
    return Features(unit(u, D, seed=2), FeatureSets.from_list([unit(1 + i % 6, D, seed=3 + i) for i in range(u)]))


def own(n: int = N, u: int = U) -> Tensor:
    return torch.randint(0, u, (n,), generator=torch.Generator().manual_seed(9))


def distances(image: Features, text: Features, local_share: float) -> Tensor:
    """METHOD section 1 over the whole pool."""
    local = all_costs(image.local, text.local, epsilon=EPSILON, iterations=ITERATIONS).value
    return (1 - local_share) * (1 - image.pooled @ text.pooled.T) + local_share * local


@pytest.mark.parametrize("local_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [1024, 5])
def test_is_brute_force_over_the_pool(local_share: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otcclip.evidence.matching.ROWS", rows)
    image, text = images(), captions()
    d = distances(image, text, local_share)
    got = rank_captions(image, text, own(), local_share=local_share, screen=U)
    nearest = d.topk(2, dim=1, largest=False)
    mine = d.gather(1, own()[:, None])
    assert torch.equal(got.best, nearest.indices[:, 0])
    torch.testing.assert_close(got.distance, nearest.values[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.margin, nearest.values[:, 1] - nearest.values[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.own_distance, mine[:, 0], atol=1e-5, rtol=0)
    # The captions strictly nearer, and half of the own one: 1/2u for the nearest, 1 - 1/2u for the farthest.
    nearer = (d < mine - 1e-6).sum(1)
    torch.testing.assert_close(got.own_share, (nearer + 0.5) / U)


def test_transport_decides_where_pooled_vectors_do_not() -> None:
    """One pooled vector for all: the order is transport's alone, and with no local share there is none."""
    image, text = images(), captions()
    image = Features(unit(1, D, seed=0).expand(N, D), image.local)
    text = Features(unit(1, D, seed=0).expand(U, D), text.local)
    got = rank_captions(image, text, own(), screen=U)
    assert torch.equal(got.best, distances(image, text, 1.0).argmin(1))
    assert len(set(got.best.tolist())) > 1


def test_outside_the_screen_an_own_caption_keeps_its_pooled_place() -> None:
    image, text = images(), captions()
    cosine = image.pooled @ text.pooled.T
    place = (cosine > cosine.gather(1, own()[:, None])).sum(1)
    got = rank_captions(image, text, own(), screen=4)
    outside = place >= 4
    assert outside.sum() > 5 and (~outside).sum() > 2
    torch.testing.assert_close(got.own_share[outside], (place[outside] + 0.5) / U)
    assert (got.own_share[~outside] < 4 / U).all()
    screened = cosine.topk(4, dim=1).indices
    assert (screened == got.best[:, None]).any(1).all()
    d = distances(image, text, 0.5)
    torch.testing.assert_close(got.distance, d.gather(1, screened).amin(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.own_distance, d.gather(1, own()[:, None])[:, 0], atol=1e-5, rtol=0)


def test_a_pool_of_one_caption() -> None:
    got = rank_captions(images(3), captions(1), torch.zeros(3, dtype=torch.int64))
    assert got.best.tolist() == [0, 0, 0] and got.margin.tolist() == [0, 0, 0]
    assert got.own_share.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_an_own_caption_is_never_nearer_than_itself(seed: int) -> None:
    """Its cost is solved twice, among the candidates and as the own one: rounding must not count it against itself."""
    text = captions(40)
    pick = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(seed))
    image = Features(text.pooled[pick], FeatureSets.from_dense(unit(200, 16, D, seed=seed)))
    got = rank_captions(image, text, pick, screen=40)
    d = distances(image, text, 0.5)
    nearest = d.argmin(1) == pick
    assert nearest.sum() > 50
    assert (got.own_share[nearest] == 0.5 / 40).all()


@pytest.mark.parametrize("screen", [1, 4, U])
def test_the_share_alone_is_the_same_and_transports_only_what_it_needs(
    screen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, text = images(), captions()
    ranking = rank_captions(image, text, own(), screen=screen)
    solved = []
    real = matching.candidate_costs

    def counted(image: Features, text: Features, columns: Tensor) -> Tensor:
        solved.append(len(columns))
        return real(image, text, columns)

    monkeypatch.setattr(matching, "candidate_costs", counted)
    assert torch.equal(own_share(image, text, own(), screen=screen), ranking.own_share)
    cosine = image.pooled @ text.pooled.T
    assert sum(solved) == int(((cosine > cosine.gather(1, own()[:, None])).sum(1) < screen).sum())
    assert (sum(solved) < N) == (screen < U)
