"""Sparsity patterns: where the zeros of S may be.

Every pattern splits a (d_out, d_in) matrix into *units* that are kept or zeroed as a whole (single entries, or tiles)
and the units, read row by row, into *groups* of equal size that each keep a fixed number. What a pattern has to say is
therefore

    unit        (rows, columns) of a unit
    atom        columns that are decided at one time by a method that walks over the columns (SparseGPT)
    group_size  units of a group; raises if the pattern does not fit the shape
    n_kept      units kept of a group

and `mendlm.masks`, the planner and SparseGPT work with any class that has these.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import ClassVar, Literal

from mendlm.budgets import as_whole
from mendlm.errors import UsageError

Scope = Literal["tensor", "row"]
SINGLE = (1, 1)


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; entries compete within the whole tensor or within their row.

    Parameters
    ----------
    sparsity : fraction of zeros in S, in [0, 1].
    scope : "tensor" (Wanda's magnitude baseline) or "row" (the TLR authors' code, Wanda itself). The two give
        different models: LLaMA-2-13B at 50 % has perplexity 5.98 by row and 6.37 by tensor.

    Raises
    ------
    UsageError : sparsity that is no number in [0, 1], or an unknown scope.
    """

    sparsity: float
    scope: Scope = "tensor"
    name: ClassVar[str] = "unstructured"
    unit: ClassVar[tuple[int, int]] = SINGLE
    atom: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _sparsity(self.sparsity))
        if self.scope not in ("tensor", "row"):
            raise UsageError(f"scope must be 'tensor' or 'row', got {self.scope!r}.")

    def group_size(self, d_out: int, d_in: int) -> int:
        """Number of consecutive entries (row-major) that compete with each other."""
        return d_out * d_in if self.scope == "tensor" else d_in

    def n_kept(self, group_size: int) -> int:
        """Entries kept of a group: all but sparsity * group_size, rounded, halves to the even number."""
        return group_size - round(self.sparsity * group_size)

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} {self.scope}"


@dataclass(frozen=True)
class NM:
    """`n` entries KEPT of every `m` consecutive entries along d_in.

    Wanda, SparseGPT and llm-compressor count the removed ones instead; at 2:4 and 4:8 the two agree.

    Parameters
    ----------
    n : entries kept of a group.
    m : entries of a group; d_in must be a multiple of it.

    Raises
    ------
    UsageError : not whole numbers with 0 <= n < m.
    """

    n: int
    m: int
    name: ClassVar[str] = "nm"
    unit: ClassVar[tuple[int, int]] = SINGLE

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            object.__setattr__(self, name, _whole_number(getattr(self, name), name))
        if not 0 <= self.n < self.m:
            raise UsageError(f"pattern n:m keeps n of m entries and needs 0 <= n < m, got {self.n}:{self.m}.")

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in S."""
        return 1.0 - self.n / self.m

    @property
    def atom(self) -> int:
        """A group is decided at one time."""
        return self.m

    def group_size(self, d_out: int, d_in: int) -> int:
        """Number of consecutive entries (row-major) that compete with each other.

        Raises
        ------
        UsageError : m does not divide d_in.
        """
        if d_in % self.m:
            raise UsageError(
                f"pattern {self} needs d_in divisible by {self.m}, got W of shape ({d_out}, {d_in}). "
                "Exclude this tensor, or use an unstructured pattern."
            )
        return self.m

    def n_kept(self, group_size: int) -> int:
        """Entries kept of a group."""
        return self.n

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Tiles:
    """Tiles of ``rows x cols`` entries, kept or zeroed as a whole; all tiles of a tensor compete.

    A tile counts as much as the sum of the scores of its entries.

    Parameters
    ----------
    sparsity : fraction of the tiles that are zero, in [0, 1].
    rows, cols : sides of a tile; they must divide d_out and d_in.

    Raises
    ------
    UsageError : sparsity that is no number in [0, 1], or a side that is no whole number from 1.
    """

    sparsity: float
    rows: int = 16
    cols: int = 16
    name: ClassVar[str] = "tiles"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _sparsity(self.sparsity))
        for name in ("rows", "cols"):
            object.__setattr__(self, name, _whole_number(getattr(self, name), name))
        if self.rows < 1 or self.cols < 1:
            raise UsageError(f"the sides of a tile must be at least 1, got {self.rows}x{self.cols}.")

    @property
    def unit(self) -> tuple[int, int]:
        """(rows, columns) of a tile."""
        return self.rows, self.cols

    @property
    def atom(self) -> int:
        """A tile is decided at one time."""
        return self.cols

    def group_size(self, d_out: int, d_in: int) -> int:
        """Number of tiles in a tensor.

        Raises
        ------
        UsageError : the sides do not divide (d_out, d_in).
        """
        if d_out % self.rows or d_in % self.cols:
            raise UsageError(
                f"tiles of {self.rows}x{self.cols} need d_out divisible by {self.rows} and d_in by {self.cols}, got W "
                f"of shape ({d_out}, {d_in}). Choose other sides, exclude this tensor, or use an unstructured pattern."
            )
        return (d_out // self.rows) * (d_in // self.cols)

    def n_kept(self, group_size: int) -> int:
        """Tiles kept: all but sparsity * group_size, rounded, halves to the even number."""
        return group_size - round(self.sparsity * group_size)

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} {self.rows}x{self.cols}"


Pattern = Unstructured | NM | Tiles
# Patterns whose sparsity may be any number: ``dataclasses.replace(pattern, sparsity=…)``.
Adjustable = Unstructured | Tiles


def n_kept_total(pattern: Pattern, d_out: int, d_in: int) -> int:
    """Entries of a (d_out, d_in) tensor that `pattern` keeps; exact, known before any weight is read.

    Raises
    ------
    UsageError : the pattern does not fit the shape.
    """
    size = pattern.group_size(d_out, d_in)
    if not size:
        return 0
    rows, cols = pattern.unit
    n_groups = d_out * d_in // (size * rows * cols)
    return n_groups * pattern.n_kept(size) * rows * cols


def _whole_number(value: object, what: str) -> int:
    whole = as_whole(value)
    if whole is None:
        raise UsageError(f"{what} must be a whole number, got {value!r}.")
    return whole


def _sparsity(value: object) -> float:
    """A number of any library as a float: one of 32 bits would round counts, and has no place in a recipe file."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        sparsity = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"sparsity must be a number in [0, 1], got {reprlib.repr(value)}.") from None
    if not 0.0 <= sparsity <= 1.0:
        raise UsageError(f"sparsity must be in [0, 1], got {sparsity!r}. 0.5 means half of the entries are zero.")
    return sparsity
