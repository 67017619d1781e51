"""Budgets: ranks, shapes and bytes turned into one another. The only home of ratio arithmetic."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from fractions import Fraction
from math import prod
from typing import Any

from mendlm.errors import UsageError

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_INTEGER = re.compile(r"\s*(\d+)\s*")


def as_whole(value: Any) -> int | None:
    """A whole number of any library, such as NumPy's, as an int; None for anything else, True and False included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def parse_rank(rank: object) -> int | str:
    """A rank as the user wrote it, in one form: an int, or a percentage such as ``"5%"`` without blanks.

    Raises
    ------
    UsageError : neither a whole number >= 0 nor a percentage in [0, 100].
    """
    whole = as_whole(rank)
    if whole is not None and whole >= 0:
        return whole
    if isinstance(rank, str):
        if match := _INTEGER.fullmatch(rank):
            return int(match[1])
        match = _PERCENT.fullmatch(rank)
        if match and Fraction(match[1]) <= 100:
            return f"{match[1]}%"
    raise UsageError(
        f"rank must be a whole number >= 0, or a percentage of min(d_out, d_in) from '0%' to '100%', got {rank!r}."
    )


def resolve_rank(rank: int | str, d_out: int, d_in: int) -> int:
    """The rank for one (d_out, d_in) matrix.

    Parameters
    ----------
    rank : an int, taken as it is (`refiners.check_rank` says whether it fits), or a percentage of ``min(d_out, d_in)``.
    d_out, d_in : shape of the matrix.

    Returns
    -------
    int. A percentage above 0 is rounded down but not below 1 (nor above ``min(d_out, d_in)``), in rational arithmetic:
    ``resolve_rank("5%", 576, 576) == 28``.

    Raises
    ------
    UsageError : `rank` is neither.
    """
    rank = parse_rank(rank)
    if isinstance(rank, int):
        return rank
    smaller = min(d_out, d_in)
    share = Fraction(rank.removesuffix("%")) / 100
    return min(smaller, max(1, int(share * smaller))) if share > 0 else 0


def dense_bytes(shape: Iterable[int], itemsize: int) -> int:
    """Bytes of a dense tensor."""
    return prod(shape) * itemsize


def bitmask_bytes(d_out: int, d_in: int) -> int:
    """Bytes of the bitmask of a (d_out, d_in) matrix: one bit an entry, rows padded to whole bytes."""
    return d_out * -(-d_in // 8)


def packed_bytes(d_out: int, d_in: int, n_kept: int, rank: int, itemsize: int) -> int:
    """Bytes of a packed (d_out, d_in) matrix: kept values, bitmask and the two factors."""
    return (n_kept + factor_params(d_out, d_in, rank)) * itemsize + bitmask_bytes(d_out, d_in)


def factor_params(d_out: int, d_in: int, rank: int) -> int:
    """Entries of A (rank, d_in) and B (d_out, rank)."""
    return rank * (d_out + d_in)


def stored_frac(stored: int, dense: int) -> float:
    """Stored over dense, both in bytes or both in parameters; 1.0 when there is nothing to store."""
    return stored / dense if dense else 1.0


def sparsity_of(n_kept: int, d_out: int, d_in: int) -> float:
    """Fraction of zeros in S when `n_kept` entries are kept."""
    n = d_out * d_in
    return 1.0 - n_kept / n if n else 0.0
