"""Patterns, criteria and masks: exact counts, ties, degenerate input."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from mendlm import NM, Unstructured, select_mask
from mendlm.config import parse_pattern, pattern_to_dict
from mendlm.criteria import CRITERIA, AbstractCriterion
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats
from mendlm.masks import _sorting_network, expand, mask_of_largest
from mendlm.patterns import Adjustable, Pattern, Tiles, n_kept_total
from strategies import matrices, patterns_for, stats_for


def kept_by_group(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Units kept of every group; every unit is kept or zeroed as a whole."""
    d_out, d_in = mask.shape
    rows, cols = pattern.unit
    kept = mask.reshape(d_out // rows, rows, d_in // cols, cols).sum(dim=(1, 3))
    assert torch.all((kept == 0) | (kept == rows * cols))
    return (kept > 0).reshape(-1, pattern.group_size(d_out, d_in)).sum(dim=1)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@given(data=st.data(), W=matrices())
def test_every_group_keeps_exactly_its_count(criterion: str, data: st.DataObject, W: torch.Tensor) -> None:
    pattern = data.draw(patterns_for(W.shape[1], None if criterion == "dsnot" else W.shape[0]))  # it has no tiles
    mask = select_mask(W, criterion, pattern, inputs=stats_for(W.shape[1]))
    assert mask.dtype == torch.bool
    assert mask.shape == W.shape
    assert mask.is_contiguous()
    assert torch.all(kept_by_group(mask, pattern) == pattern.n_kept(pattern.group_size(*W.shape)))
    assert int(mask.sum()) == n_kept_total(pattern, *W.shape)


@given(data=st.data(), W=matrices())
def test_magnitude_mask_equals_stable_sorting(data: st.DataObject, W: torch.Tensor) -> None:
    pattern = data.draw(patterns_for(W.shape[1]))
    mask = select_mask(W, "magnitude", pattern)
    group = pattern.group_size(*W.shape)
    groups = np.abs(W.numpy()).reshape(-1, group)
    expected = np.stack([oracle.mask_by_sorting(g, pattern.n_kept(group)) for g in groups])
    np.testing.assert_array_equal(mask.numpy().reshape(-1, group), expected)


@pytest.mark.parametrize("pattern", [NM(3, 5), NM(1, 16), NM(0, 3), NM(239, 240), NM(7, 240)], ids=str)
def test_any_n_of_any_m(pattern: NM) -> None:
    W = torch.randn(6, 240, generator=torch.Generator().manual_seed(5))
    mask = select_mask(W, "magnitude", pattern).reshape(6, -1, pattern.m)
    for row in range(6):
        for group in range(240 // pattern.m):
            sizes = W[row].abs().reshape(-1, pattern.m)[group]
            kept = set(torch.argsort(sizes, descending=True)[: pattern.n].tolist())
            assert set(mask[row, group].nonzero().flatten().tolist()) == kept


def test_tiles_go_by_the_sum_of_their_scores() -> None:
    W = torch.ones(4, 6)
    W[0, 0] = 5.0  # the largest entry; its tile sums to 10
    W[:2, 3:] = -2.0  # 12
    W[2:, :3] = 1.9  # 11.4; the last tile sums to 6
    mask = select_mask(W, "magnitude", Tiles(0.5, rows=2, cols=3))
    here, gone = [True] * 3, [False] * 3
    assert mask.tolist() == [gone + here] * 2 + [here + gone] * 2


@given(data=st.data(), W=matrices())
def test_tiles_equal_sorting_of_their_sums(data: st.DataObject, W: torch.Tensor) -> None:
    W = W.round()  # sums of whole numbers are exact in any order
    d_out, d_in = W.shape
    pattern = data.draw(patterns_for(d_in, d_out).filter(lambda p: isinstance(p, Tiles)))
    rows, cols = pattern.unit
    sums = np.array(
        [
            [np.abs(W.numpy()[i : i + rows, j : j + cols]).sum() for j in range(0, d_in, cols)]
            for i in range(0, d_out, rows)
        ]
    )
    expected = np.kron(oracle.mask_by_sorting(sums, pattern.n_kept(sums.size)), np.ones((rows, cols), bool))
    np.testing.assert_array_equal(select_mask(W, "magnitude", pattern).numpy(), expected)


def test_halves_are_rounded_to_the_even_number_of_zeros() -> None:
    assert [Unstructured(0.5).n_kept(size) for size in (1, 3, 5, 7)] == [1, 1, 3, 3]
    assert [Tiles(0.5).n_kept(size) for size in (1, 3, 5, 7)] == [1, 1, 3, 3]


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_the_mask_of_the_largest_leaves_the_nearest_matrix(size: float) -> None:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) * size
    x *= torch.rand(16, 24, generator=torch.Generator().manual_seed(1)) ** 4
    for pattern in (Unstructured(0.4), Unstructured(0.6, "row"), NM(2, 4)):
        assert torch.equal(mask_of_largest(x, pattern), select_mask(x, "magnitude", pattern))
    mask = mask_of_largest(x, Tiles(0.5, 4, 4))
    energies = x.double().reshape(4, 4, 6, 4).square().sum(dim=(1, 3)).flatten()
    kept = mask.reshape(4, 4, 6, 4)[:, 0, :, 0].flatten()
    assert torch.equal(mask, expand(kept.reshape(4, 6), (4, 4)))
    assert int(kept.sum()) == 12
    assert energies[kept].min() > energies[~kept].max()
    assert torch.equal(mask_of_largest(torch.zeros(8, 8), Tiles(0.5, 4, 4)).sum(), torch.tensor(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.7, "row"), NM(1, 4)], ids=str)
def test_half_precision_masks_keep_the_largest(dtype: torch.dtype, pattern: Pattern) -> None:
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
    with pytest.raises(UsageError, match=r"sparsity must be in \[0, 1\], got"):
        Tiles(sparsity)


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor, Fraction])
def test_numbers_of_other_libraries_are_those_of_python(kind: Any) -> None:
    assert type(Unstructured(kind(0.5)).sparsity) is type(Tiles(kind(0.5)).sparsity) is float
    assert NM(np.int64(2), torch.tensor(4)) == NM(2, 4)  # type: ignore[arg-type]
    assert all(type(side) is int for side in dataclasses.astuple(NM(np.int32(2), np.int32(4))))  # type: ignore[arg-type]
    assert Tiles(0.5, np.int64(2), 3).unit == (2, 3)  # type: ignore[arg-type]
    # In 32 bits a product of seven digits rounds to another whole number.
    assert Unstructured(np.float32(0.7)).n_kept(45_088_768) == 45_088_768 - round(float(np.float32(0.7)) * 45_088_768)


def test_patterns_of_no_numbers_are_refused() -> None:
    for value in ("0.5", True, None, [0.5]):
        with pytest.raises(UsageError, match=r"sparsity must be a number in \[0, 1\], got"):
            Unstructured(value)  # type: ignore[arg-type]
    for n, m in ((2.0, 4), ("2", 4), (2, None), (True, 4)):
        with pytest.raises(UsageError, match=r"[nm] must be a whole number, got"):
            NM(n, m)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cols must be a whole number, got 2\.0"):
        Tiles(0.5, 2, 2.0)  # type: ignore[arg-type]


def test_bad_patterns_are_refused() -> None:
    with pytest.raises(UsageError, match="scope must be 'tensor' or 'row', got 'column'"):
        Unstructured(0.5, "column")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 <= n < m, got 4:4"):
        NM(4, 4)
    with pytest.raises(UsageError, match=r"2:4 needs d_in divisible by 4, got W of shape \(3, 6\)"):
        select_mask(torch.ones(3, 6), "magnitude", NM(2, 4))
    with pytest.raises(UsageError, match="sides of a tile must be at least 1, got 0x16"):
        Tiles(0.5, rows=0)
    for shape in ((16, 24), (24, 16)):
        with pytest.raises(
            UsageError, match=r"tiles of 16x16 need d_out divisible by 16 and d_in by 16, got W of shape"
        ):
            select_mask(torch.ones(shape), "magnitude", Tiles(0.5))


def test_patterns_are_short_to_read_and_sparsities_can_be_replaced() -> None:
    patterns = [Unstructured(0.5), Unstructured(1 / 3, "row"), NM(2, 4), Tiles(0.5, 16, 32)]
    assert [str(pattern) for pattern in patterns] == ["0.5 tensor", "0.3333 row", "2:4", "0.5 16x32"]
    for pattern in patterns:
        if isinstance(pattern, Adjustable):
            changed = dataclasses.replace(pattern, sparsity=0.25)
            assert n_kept_total(changed, 32, 64) == 1536
            assert (changed.unit, type(changed)) == (pattern.unit, type(pattern))


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        ("3:5", NM(3, 5)),
        ({"sparsity": 0.5, "scope": "row"}, Unstructured(0.5, "row")),
        ({"sparsity": 0.5, "tile": "16x8"}, Tiles(0.5, 16, 8)),
        ({"sparsity": 1, "tile": [4, 4]}, Tiles(1.0, 4, 4)),
    ],
)
def test_patterns_are_parsed_and_written(written: object, pattern: Pattern) -> None:
    assert parse_pattern(written) == pattern
    assert parse_pattern(pattern) is pattern
    assert parse_pattern(pattern_to_dict(pattern)) == pattern
    assert json.loads(json.dumps(pattern_to_dict(pattern))) == pattern_to_dict(pattern)


@pytest.mark.parametrize("tile", ["16", "16x", "x16", 16, [16], [16, 16, 16], [16.0, 16.0], [True, True], None])
def test_bad_tiles_are_refused(tile: object) -> None:
    with pytest.raises(UsageError, match="tile must be rows x columns such as '16x16'"):
        parse_pattern({"sparsity": 0.5, "tile": tile})
    with pytest.raises(UsageError, match="pattern must be 'n:m'"):
        parse_pattern({"sparsity": 0.5, "tile": "16x16", "scope": "row"})
    with pytest.raises(UsageError, match="sides of a tile must be at least 1"):
        parse_pattern({"sparsity": 0.5, "tile": "0x16"})


@pytest.mark.parametrize("criterion", [name for name, kind in CRITERIA.items() if kind.needs != "weights"])
def test_missing_statistics_are_refused(criterion: str) -> None:
    W = torch.ones(4, 6)
    with pytest.raises(UsageError, match=r"of the inputs\. Calibrate, or pass inputs"):
        select_mask(W, criterion, Unstructured(0.5))
    with pytest.raises(UsageError, match=r"the statistics are of 5 inputs, W of shape \(4, 6\) has 6"):
        select_mask(W, criterion, Unstructured(0.5), inputs=stats_for(5))


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


@pytest.mark.parametrize("n", range(1, 11))
def test_sorting_network_sorts_every_row_of_zeros_and_ones(n: int) -> None:
    """By the zero-one principle it then sorts anything."""
    rows = torch.cartesian_prod(*[torch.tensor([0, 1])] * n).reshape(-1, n)
    columns = list(rows.T)
    for i, j in _sorting_network(n):
        assert i < j
        columns[i], columns[j] = torch.minimum(columns[i], columns[j]), torch.maximum(columns[i], columns[j])
    assert torch.equal(torch.stack(columns, dim=1), rows.sort(dim=1).values)
