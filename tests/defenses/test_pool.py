"""The pool: first in, first out; a thing once; neighbours in full precision; 2 % of the data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from otcclip.defenses.base import PairBatch
from otcclip.defenses.pool import Pool, caption_ids, pool_size


def test_first_in_first_out() -> None:
    pool = Pool(4)
    for ids in ([10, 11, 12], [13], [14, 15]):
        pool.push(torch.tensor(ids), torch.tensor(ids)[:, None].float(), tokens=torch.tensor(ids)[:, None] * 2)
    assert pool.columns["id"].tolist() == [12, 13, 14, 15]
    assert pool.columns["vector"][:, 0].tolist() == [12.0, 13.0, 14.0, 15.0]
    assert pool.columns["tokens"][:, 0].tolist() == [24, 26, 28, 30]


def test_a_thing_that_comes_again_leaves_its_old_place() -> None:
    pool = Pool(3)
    pool.push(torch.tensor([1, 2, 3]), torch.tensor([[0.1], [0.2], [0.3]]))
    pool.push(torch.tensor([1, 4]), torch.tensor([[0.9], [0.4]]))
    assert pool.columns["id"].tolist() == [3, 1, 4]
    torch.testing.assert_close(pool.columns["vector"][:, 0], torch.tensor([0.3, 0.9, 0.4]))


def test_of_more_than_fit_the_last_stay() -> None:
    pool = Pool(2)
    pool.push(torch.arange(5), torch.arange(5.0)[:, None])
    assert pool.columns["id"].tolist() == [3, 4]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True), max_size=8))
def test_is_a_list_of_distinct_things(size: int, pushes: list[list[int]]) -> None:
    pool, held = Pool(size), []
    for ids in pushes:
        pool.push(torch.tensor(ids), torch.zeros(len(ids), 1))
        held = ([thing for thing in held if thing not in ids] + ids)[-size:]
        assert pool.columns["id"].tolist() == held


def test_holds_no_gradient_and_no_view_of_a_batch() -> None:
    pool, vector = Pool(3), torch.ones(2, 4, requires_grad=True)
    pool.push(torch.tensor([0, 1]), vector)
    assert not pool.columns["vector"].requires_grad
    with torch.no_grad():
        vector.zero_()
    assert (pool.columns["vector"] == 1).all()


def test_nearest_is_the_largest_cosine_also_under_autocast() -> None:
    """Two neighbours nearer to each other than bfloat16 can tell: the right one is not the older one."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    query = F.normalize(torch.randn(30, 8, generator=generator), dim=1)
    pool = Pool(60)
    pool.push(torch.arange(40), vectors)
    torch.testing.assert_close(pool.nearest(query), (query.double() @ vectors.double().T).argmax(1))
    close = F.normalize(query[:1] + 1e-3 * vectors[:1], dim=1)
    pool.push(torch.tensor([100, 101]), torch.cat([close, query[:1]]))
    with torch.autocast("cpu", torch.bfloat16):
        assert pool.columns["id"][pool.nearest(query[:1])].tolist() == [101]


@pytest.mark.parametrize(
    ("share", "pairs", "things", "size"), [(0.02, 9214, 7000, 184), (0.02, 20, 20, 2), (0.5, 100, 7, 7), (1.0, 9, 9, 9)]
)
def test_size(share: float, pairs: int, things: int, size: int) -> None:
    assert pool_size(share, pairs, things) == size


def test_rows_of_a_batch_know_what_they_are() -> None:
    batch = PairBatch(torch.tensor([5, 2, 7, 0]), (), torch.zeros(2, 3), torch.tensor([1, 0, 1, -1]))
    caption_of = torch.tensor([9, 9, 30, 9, 9, 40, 9, 40])
    assert caption_ids(batch, caption_of).tolist() == [30, 40]
