"""Ranks and bytes: exact, also where floats would not be."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendlm import budgets
from mendlm.errors import UsageError


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        ("5%", (576, 576), 28),  # 28.8
        ("5%", (1536, 576), 28),
        ("5%", (64, 96), 3),
        ("5%", (10, 10), 1),  # 0.5: at least 1
        ("100%", (7, 9), 7),
        ("0%", (64, 64), 0),
        ("0.1%", (1000, 2000), 1),
        ("29%", (100, 100), 29),  # 0.29 * 100 is 28.999999999999996
        ("5%", (0, 4), 0),
        (16, (8, 8), 16),  # whether it fits is for check_rank to say
        ("16", (64, 64), 16),
        (" 5 % ", (100, 100), 5),
        (0, (8, 8), 0),
    ],
)
def test_resolve_rank(rank: int | str, shape: tuple[int, int], expected: int) -> None:
    assert budgets.resolve_rank(rank, *shape) == expected


@given(st.integers(0, 1000), st.integers(1, 5000), st.integers(1, 5000))
def test_percentage_is_the_floor_of_the_exact_product(permille: int, d_out: int, d_in: int) -> None:
    rank = budgets.resolve_rank(f"{permille // 10}.{permille % 10}%", d_out, d_in)
    exact = Fraction(permille, 1000) * min(d_out, d_in)
    assert rank == (max(1, exact.numerator // exact.denominator) if permille else 0)
    assert 0 <= rank <= min(d_out, d_in)


@pytest.mark.parametrize("rank", [-1, "-1", "101%", "5%%", "", "five", 2.5, True, None, "1e2"])
def test_bad_rank(rank: object) -> None:
    with pytest.raises(
        UsageError, match=rf"rank must be a whole number >= 0, or a percentage .* got {re.escape(repr(rank))}\."
    ):
        budgets.parse_rank(rank)


def test_half_in_bf16_is_nine_sixteenths() -> None:
    dense = budgets.dense_bytes((4096, 4096), 2)
    packed = budgets.packed_bytes(4096, 4096, n_kept=4096 * 2048, rank=0, itemsize=2)
    assert Fraction(packed, dense) == Fraction(9, 16)


def test_packed_bytes_pads_rows_and_counts_factors() -> None:
    # 3 rows of 2 bytes, 5 values and 2 * (3 + 9) factor entries of 4 bytes.
    assert budgets.packed_bytes(3, 9, n_kept=5, rank=2, itemsize=4) == 6 + 4 * (5 + 24)
    assert budgets.stored_frac(1, 0) == 1.0
    assert budgets.sparsity_of(1, 2, 2) == 0.75
