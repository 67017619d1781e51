"""Patterns, criteria and masks: exact counts, ties, degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from mendlm import NM, Unstructured, select_mask
from mendlm.criteria import CRITERIA, AbstractCriterion
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats
from mendlm.patterns import n_kept_total
from strategies import matrices, patterns_for


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@given(data=st.data(), W=matrices())
def test_every_group_keeps_exactly_its_count(criterion: str, data: st.DataObject, W: torch.Tensor) -> None:
    pattern = data.draw(patterns_for(W.shape[1]))
    mask = select_mask(W, criterion, pattern)
    group = pattern.group_size(*W.shape)
    assert mask.dtype == torch.bool
    assert mask.shape == W.shape
    assert torch.all(mask.reshape(-1, group).sum(dim=1) == pattern.n_kept(group))
    assert int(mask.sum()) == n_kept_total(pattern, *W.shape)


@given(data=st.data(), W=matrices())
def test_magnitude_mask_equals_stable_sorting(data: st.DataObject, W: torch.Tensor) -> None:
    pattern = data.draw(patterns_for(W.shape[1]))
    mask = select_mask(W, "magnitude", pattern)
    group = pattern.group_size(*W.shape)
    groups = np.abs(W.numpy()).reshape(-1, group)
    expected = np.stack([oracle.mask_by_sorting(g, pattern.n_kept(group)) for g in groups])
    np.testing.assert_array_equal(mask.numpy().reshape(-1, group), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.7, "row"), NM(1, 4)], ids=str)
def test_half_precision_masks_keep_the_largest(dtype: torch.dtype, pattern: Unstructured | NM) -> None:
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = select_mask(W, "magnitude", pattern)
    group = pattern.group_size(*W.shape)
    scores, kept = W.abs().double().reshape(-1, group), mask.reshape(-1, group)
    least_kept = torch.where(kept, scores, torch.inf).min(dim=1).values
    most_pruned = torch.where(kept, -torch.inf, scores).max(dim=1).values
    assert torch.all(least_kept >= most_pruned)
    assert int(mask.sum()) == n_kept_total(pattern, *W.shape)


def test_random_masks_follow_their_generator() -> None:
    W = torch.ones(40, 40)
    draw = [
        select_mask(W, "random", Unstructured(0.5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_tensor_and_row_scope_differ() -> None:
    W = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert select_mask(W, "magnitude", Unstructured(0.5, "tensor")).sum(dim=1).tolist() == [0, 4]
    assert select_mask(W, "magnitude", Unstructured(0.5, "row")).sum(dim=1).tolist() == [2, 2]


def test_n_of_nm_is_the_number_kept() -> None:
    W = torch.arange(1.0, 17.0).reshape(2, 8)
    assert select_mask(W, "magnitude", NM(2, 8)).sum(dim=1).tolist() == [2, 2]


def test_the_argument_is_not_modified() -> None:
    W = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    before = W.clone()
    select_mask(W, "magnitude", NM(2, 4))
    assert torch.equal(W, before)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_sparsity_outside_the_unit_interval_is_refused(sparsity: float) -> None:
    with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\], got"):
        Unstructured(sparsity)


def test_bad_patterns_are_refused() -> None:
    with pytest.raises(UsageError, match="scope must be 'tensor' or 'row', got 'column'"):
        Unstructured(0.5, "column")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 <= n < m, got 4:4"):
        NM(4, 4)
    with pytest.raises(UsageError, match=r"2:4 needs d_in divisible by 4, got W of shape \(3, 6\)"):
        select_mask(torch.ones(3, 6), "magnitude", NM(2, 4))


def test_unknown_criterion_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown criterion 'magnitud'\. Did you mean 'magnitude'"):
        select_mask(torch.ones(2, 2), "magnitud", Unstructured(0.5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(bad: float) -> None:
    W = torch.ones(4, 4)
    W[1, 2] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        select_mask(W, "magnitude", Unstructured(0.5))


def test_large_finite_weights_are_accepted() -> None:
    W = torch.full((64, 64), 3e38)
    assert int(select_mask(W, "magnitude", Unstructured(0.5)).sum()) == 2048


def test_wrong_input_is_refused() -> None:
    with pytest.raises(UsageError, match="2-D floating tensor"):
        select_mask(torch.ones(4), "magnitude", Unstructured(0.5))
    with pytest.raises(UsageError, match="2-D floating tensor"):
        select_mask(torch.ones(4, 4, dtype=torch.int32), "magnitude", Unstructured(0.5))
    with pytest.raises(UsageError, match="scores of shape"):
        select_mask(torch.ones(4, 4), Broken(), Unstructured(0.5))


class Broken(AbstractCriterion):
    """Scores of the wrong shape."""

    name = "broken"

    def scores(self, W: torch.Tensor, inputs: InputStats | None, generator: torch.Generator) -> torch.Tensor:
        return W[0]
