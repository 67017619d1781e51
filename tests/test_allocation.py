"""Outlier-weighed layer sparsity: shares of outliers, and what becomes of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mendlm.allocation import outlier_frac, owl_sparsities
from mendlm.errors import UsageError
from strategies import stats_for


def weighted_mean(sparsities: dict[int, float], weights: dict[int, int]) -> float:
    return sum(sparsities[block] * weights[block] for block in weights) / sum(weights.values())


def test_outliers_counted_by_hand() -> None:
    W = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -2.0]])
    # Scores |W| * (1, 2, 6): 1 2 6 / 1 2 12, mean 4.
    second_moment = torch.tensor([1.0, 4.0, 36.0], dtype=torch.float64)
    assert outlier_frac(W, second_moment, 1.4) == pytest.approx(2 / 6)
    assert outlier_frac(W, second_moment, 1.5) == pytest.approx(1 / 6)  # 6 is not above 1.5 * 4
    assert outlier_frac(W, second_moment, 3.0) == 0.0
    assert outlier_frac(W, 7 * second_moment, 1.4) == pytest.approx(2 / 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outliers_equal_the_formula(dtype: torch.dtype) -> None:
    W = torch.randn(40, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    second_moment = stats_for(60).second_moment
    scores = np.abs(W.double().numpy()) * np.sqrt(second_moment.numpy())
    for threshold in (0.5, 1.0, 3.0):
        assert outlier_frac(W, second_moment, threshold) == (scores > threshold * scores.mean()).mean()


def test_outliers_of_degenerate_weights() -> None:
    assert outlier_frac(torch.zeros(3, 4), torch.ones(4), 5.0) == 0.0
    assert outlier_frac(torch.ones(3, 4), torch.zeros(4), 5.0) == 0.0
    assert outlier_frac(torch.ones(0, 4), torch.ones(4), 5.0) == 0.0
    with pytest.raises(UsageError, match=r"length of an input of W, 4, got shape \(3,\)"):
        outlier_frac(torch.ones(3, 4), torch.ones(3), 5.0)


def test_sparsities_computed_by_hand() -> None:
    # Weighted mean of D: (1 * 0.01 + 1 * 0.02 + 2 * 0.05) / 4 = 0.0325; furthest is block 0 with -0.0225.
    # 0.08 / 0.0225 = 32/9; s = 0.7 - 32/9 * (-0.0225, -0.0125, 0.0175).
    chosen = owl_sparsities({0: 0.01, 1: 0.02, 4: 0.05}, {0: 10, 1: 10, 4: 20}, 0.7, 0.08)
    assert chosen == pytest.approx({0: 0.78, 1: 0.7 + 0.4 / 9, 4: 0.7 - 0.56 / 9}, abs=1e-15)


@given(
    blocks=st.dictionaries(
        st.integers(0, 99), st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=12
    ),
    sparsity=st.floats(0, 1),
    spread=st.floats(0, 0.99),
)
def test_mean_bounds_and_order(blocks: dict[int, tuple[float, int]], sparsity: float, spread: float) -> None:
    fracs = {block: frac for block, (frac, _) in blocks.items()}
    weights = {block: size for block, (_, size) in blocks.items()}
    chosen = owl_sparsities(fracs, weights, sparsity, spread)
    assert list(chosen) == list(fracs)
    assert weighted_mean(chosen, weights) == pytest.approx(sparsity, abs=1e-12)
    assert all(0 <= s <= 1 and abs(s - sparsity) <= spread + 1e-12 for s in chosen.values())
    by_outliers = sorted(fracs, key=fracs.__getitem__)
    assert all(chosen[a] >= chosen[b] for a, b in itertools.pairwise(by_outliers))


def test_the_furthest_block_uses_the_whole_spread() -> None:
    chosen = owl_sparsities({0: 0.1, 1: 0.1, 2: 0.4}, {0: 1, 1: 1, 2: 1}, 0.5, 0.08)
    assert chosen == pytest.approx({0: 0.54, 1: 0.54, 2: 0.42})


@pytest.mark.parametrize("frac", [0.0, 0.1, 1 / 3])
def test_equally_many_outliers_leave_the_sparsity_as_it_is(frac: float) -> None:
    weights = {0: 3, 1: 7, 2: 11}
    assert owl_sparsities(dict.fromkeys(weights, frac), weights, 0.6, 0.08) == dict.fromkeys(weights, 0.6)


def test_one_block_and_no_spread_leave_the_sparsity_as_it_is() -> None:
    assert owl_sparsities({3: 0.2}, {3: 100}, 0.6, 0.08) == {3: 0.6}
    assert owl_sparsities({0: 0.2, 1: 0.1}, {0: 1, 1: 1}, 0.6, 0.0) == {0: 0.6, 1: 0.6}


def test_near_0_and_1_all_blocks_move_less() -> None:
    fracs, weights = {0: 0.1, 1: 0.2, 2: 0.6}, {0: 1, 1: 1, 2: 1}  # -0.2, -0.1 and 0.3 from their mean
    high = owl_sparsities(fracs, weights, 0.95, 0.4)
    assert high == pytest.approx({0: 1.0, 1: 0.975, 2: 0.875})
    low = owl_sparsities(fracs, weights, 0.15, 0.4)
    assert low == pytest.approx({0: 0.25, 1: 0.2, 2: 0.0})
    assert owl_sparsities(fracs, weights, 1.0, 0.4) == {0: 1.0, 1: 1.0, 2: 1.0}
    assert owl_sparsities(fracs, weights, 0.0, 0.4) == {0: 0.0, 1: 0.0, 2: 0.0}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="there is none to compress"):
        owl_sparsities({}, {}, 0.5, 0.1)
    with pytest.raises(UsageError, match="block 2 is in only one of"):
        owl_sparsities({0: 0.1, 2: 0.1}, {0: 1}, 0.5, 0.1)
    with pytest.raises(UsageError, match=r"outliers of block 1 must be in \[0, 1\], got nan"):
        owl_sparsities({0: 0.1, 1: float("nan")}, {0: 1, 1: 1}, 0.5, 0.1)
    with pytest.raises(UsageError, match="block 0 must have parameters, got 0"):
        owl_sparsities({0: 0.1}, {0: 0}, 0.5, 0.1)
    with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        owl_sparsities({0: 0.1}, {0: 1}, 1.5, 0.1)
    with pytest.raises(UsageError, match=r"spread must be in \[0, 1\), got 1"):
        owl_sparsities({0: 0.1}, {0: 1}, 0.5, 1)
