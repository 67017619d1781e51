"""Sparsity patterns: where the zeros of S may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mendlm.errors import UsageError

Scope = Literal["tensor", "row"]


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
    UsageError : sparsity outside [0, 1], or an unknown scope.
    """

    sparsity: float
    scope: Scope = "tensor"
    name: ClassVar[str] = "unstructured"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise UsageError(
                f"sparsity must be in [0, 1], got {self.sparsity!r}. 0.5 means half of the entries are zero."
            )
        if self.scope not in ("tensor", "row"):
            raise UsageError(f"scope must be 'tensor' or 'row', got {self.scope!r}.")

    def group_size(self, d_out: int, d_in: int) -> int:
        """Number of consecutive entries (row-major) that compete with each other."""
        return d_out * d_in if self.scope == "tensor" else d_in

    def n_kept(self, group_size: int) -> int:
        """Entries kept of a group: the nearest integer to (1 - sparsity) * group_size, halves pruned less."""
        return group_size - round(self.sparsity * group_size)

    def __str__(self) -> str:
        return f"{self.sparsity:.4g} {self.scope}"


@dataclass(frozen=True)
class NM:
    """`n` entries KEPT of every `m` consecutive entries along d_in.

    Wanda, SparseGPT and llm-compressor count the removed ones instead; at 2:4 and 4:8 the two agree.

    Raises
    ------
    UsageError : not 0 <= n < m.
    """

    n: int
    m: int
    name: ClassVar[str] = "nm"

    def __post_init__(self) -> None:
        if not 0 <= self.n < self.m:
            raise UsageError(f"pattern n:m keeps n of m entries and needs 0 <= n < m, got {self.n}:{self.m}.")

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in S."""
        return 1.0 - self.n / self.m

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


Pattern = Unstructured | NM


def n_kept_total(pattern: Pattern, d_out: int, d_in: int) -> int:
    """Entries of a (d_out, d_in) tensor that `pattern` keeps; exact, known before any weight is read.

    Raises
    ------
    UsageError : the pattern does not fit the shape.
    """
    size = pattern.group_size(d_out, d_in)
    n_groups = d_out * d_in // size if size else 0
    return n_groups * pattern.n_kept(size)
