"""FeatureSets: what goes in packed comes out padded, and what cannot be a set is refused by name."""

import pytest
import torch

from otcclip.transport import FeatureSets


def test_padded_and_packed_are_inverse(ragged):
    sets = ragged([3, 1, 5])
    values, mask = sets.padded()
    assert values.shape == (3, 5, 6) and mask.sum(1).tolist() == [3, 1, 5]
    assert not values[~mask].any()
    back = FeatureSets.from_padded(values, mask)
    assert torch.equal(back.values, sets.values) and torch.equal(back.offsets, sets.offsets)


def test_from_padded_never_reads_the_padding(ragged):
    values, mask = ragged([2, 4]).padded()
    values = values.masked_fill(~mask[..., None], torch.nan)
    assert FeatureSets.from_padded(values, mask).validate().values.isfinite().all()


def test_from_dense_is_a_list_of_equal_sets(unit):
    dense = unit(4, 3, 6, seed=1)
    sets = FeatureSets.from_dense(dense)
    assert len(sets) == 4 and sets.dim == 6 and sets.sizes.tolist() == [3] * 4
    assert torch.equal(sets[2], dense[2]) and torch.equal(sets[-1], dense[3])


def test_take_concatenate_and_pooled(ragged):
    sets = ragged([3, 1, 5])
    picked = sets.take([2, 0, 2, -2])
    assert picked.sizes.tolist() == [5, 3, 5, 1]
    assert torch.equal(picked[1], sets[0]) and torch.equal(picked[2], sets[2]) and torch.equal(picked[3], sets[1])
    assert torch.equal(sets.take(torch.tensor([True, False, True])).values, sets.take([0, 2]).values)
    assert len(sets.take([])) == 0
    joined = FeatureSets.concatenate([sets, picked])
    assert len(joined) == 7 and torch.equal(joined[3], sets[2])
    assert torch.allclose(sets.pooled()[2], torch.nn.functional.normalize(sets[2].mean(0), dim=0), atol=1e-6)


def test_gradient_flows_through_every_rearrangement(unit):
    values = unit(6, 4, seed=3).requires_grad_()
    sets = FeatureSets(values, torch.tensor([0, 2, 6]))
    sets.take([1, 1]).padded()[0].sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, torch.tensor([0.0, 0, 2, 2, 2, 2])[:, None].expand(6, 4))
    assert not sets.detach().values.requires_grad


def test_to_changes_dtype_and_keeps_offsets(ragged):
    sets = ragged([2, 3]).to(torch.float64)
    assert sets.values.dtype == torch.float64 and sets.offsets.dtype == torch.int64


def test_bfloat16_rounding_counts_as_unit_norm(unit):
    values = torch.nn.functional.normalize(unit(500, 64, seed=5).bfloat16(), dim=-1)
    FeatureSets.from_dense(values[None]).validate()


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        (torch.ones(3), [0, 3], r"values: expected \[total, d\] floating point, got \[3\] float32"),
        (torch.ones(3, 2, dtype=torch.int64), [0, 3], "values: .*int64"),
        (torch.ones(3, 2), [0, 2], "offsets: expected to run from 0 to total = 3, got 0 to 2"),
        (torch.ones(3, 2), [0, 2, 1, 3], "offsets: not monotone, got 2 then 1"),
        (torch.ones(3, 2), [0, 2, 2, 3], "offsets: set 1 is empty"),
        (torch.ones(3, 2), [[0, 3]], r"offsets: expected \[n \+ 1\] int64"),
    ],
)
def test_bad_structure_is_refused(values, offsets, message):
    with pytest.raises(ValueError, match=message):
        FeatureSets(values, torch.tensor(offsets))


def test_bad_makers_are_refused(ragged, unit):
    with pytest.raises(ValueError, match="sets: expected at least one"):
        FeatureSets.from_list([])
    with pytest.raises(ValueError, match=r"sets: .* one d, got trailing shapes \[\(3,\), \(4,\)\]"):
        FeatureSets.from_list([unit(2, 3, seed=0), unit(2, 4, seed=0)])
    with pytest.raises(ValueError, match=r"values: expected \[n, m, d\], got \[2, 3\]"):
        FeatureSets.from_dense(unit(2, 3, seed=0))
    with pytest.raises(ValueError, match=r"values: expected \[n, m, d\]"):
        FeatureSets.from_padded(unit(2, 3, seed=0), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected \[2, 3\] bool, got \[2, 3\] float32"):
        FeatureSets.from_padded(unit(2, 3, 4, seed=0), torch.ones(2, 3))
    with pytest.raises(ValueError, match="offsets: set 1 is empty"):
        FeatureSets.from_padded(unit(2, 3, 4, seed=0), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="parts: expected at least one"):
        FeatureSets.concatenate([])
    with pytest.raises(ValueError, match=r"parts: expected one dim, got \[6, 7\]"):
        FeatureSets.concatenate([ragged([2]), ragged([2], 7)])
    with pytest.raises(ValueError, match=r"index: expected integers in \[-2, 2\), got \[2\]"):
        ragged([2, 2]).take([2])
    with pytest.raises(IndexError, match="index: 2"):
        ragged([2, 2])[2]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_validate_names_the_vector_and_its_set(ragged, poison):
    sets = ragged([2, 3])
    with pytest.raises(ValueError, match=r"x: expected unit vectors, vector 3 \(set 1\) has norm 1.5"):
        values = sets.values.clone()
        values[3] *= 1.5
        FeatureSets(values, sets.offsets).validate("x")
    values[1, 2] = poison
    with pytest.raises(ValueError, match=r"x: vector 1 \(set 0\) holds NaN or inf"):
        FeatureSets(values, sets.offsets).validate("x")
    with pytest.raises(ValueError, match="x: expected at least one set"):
        sets.take([]).validate("x")
