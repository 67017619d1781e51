"""SparseGPT: prune column after column, the columns to the right make up for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion, Needs, Selection, statistics
from mendlm.errors import NonFiniteError, UsageError
from mendlm.inputs import InputStats, check_gram
from mendlm.linalg import all_finite, compute_dtype, inverse_factor, with_damping
from mendlm.masks import expand, keep_largest, pool
from mendlm.patterns import Pattern, Scope

SMALLEST_DAMPING = 1e-6  # the first share tried after 0
# Columns that are eliminated one by one; above it halves are joined by a matrix product.
LEAF = 16


class Factor(NamedTuple):
    """U (d_in, d_in) upper triangular with ``inv(H) = U.T @ U``, and the share of damping in H."""

    U: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPT(AbstractCriterion):
    """Optimal brain surgery with one order of columns for all rows; chooses the mask and updates the kept weights.

    With ``H = gram + damping * mean(diag(gram)) * I`` and ``inv(H) = U.T @ U``, U upper triangular, for the columns j
    from left to right

        error = w_j / U_jj where the mask prunes, 0 where it keeps;   w_k <- w_k - error * U_jk  for k > j,

    which minimises the error of the outputs over all weights to the right. The mask keeps the largest
    ``w_j^2 / U_jj^2``, the rise of that error, as the weights are when a block of columns is reached.

    Parameters
    ----------
    block_size : columns whose mask is chosen at one time, >= 1 (the paper's B and B_s). Rounded down to a multiple of
        the pattern's m or tile width, at least one of these; the last block may be narrower.
    damping : share of the mean of the Gram diagonal that is added to it, >= 0. Ten times more (1e-6 after 0), again and
        again up to 1, where a Cholesky factorization fails; `Selection.damping` says what it was in the end.

    Raises
    ------
    UsageError : a field out of range, or a Gram matrix that is not symmetric, or not positive definite with the largest
        damping either.
    NonFiniteError : the Gram matrix, or the result, holds NaN or infinity.

    Notes
    -----
    Counts are exact: a group of the pattern that extends over several blocks keeps a number of units in each that is
    proportional to its width, rounded so that the sums up to every block are nearest to proportional. Unstructured
    by tensor is one threshold per block for all rows, by row one per block and row; n:m groups are chosen when their
    first column is reached.

    Cost: d_out d_in^2 flops in matrix products plus, once for all weights with the same inputs, 4/3 d_in^3 in float64
    for U. float32 (float64 for float64 `W`), on the device of `W`. Memory: four copies of W, and U, which stays in the
    cache of the statistics.

    References
    ----------
    .. [1] Frantar and Alistarh (2023), SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
       arXiv:2301.00774, Algorithm 1; Section 3.3 (mask by blocks), 3.4 (n:m). Deviations: U from one Cholesky
       factorization of the reversed H instead of two and an inverse; exact counts, also under ties, where its code
       prunes whatever is not above a threshold; weights of dead inputs are left to the caller.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[Needs] = "gram"
    default_scope: ClassVar[Scope] = "tensor"
    block_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping must be a number >= 0, got {self.damping!r}. The paper's code uses 0.01.")

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """``W^2 / diag(U)^2``: what `select` ranks by, before any weight was updated."""
        dtype = compute_dtype(W.dtype)
        U = self.factor(W, statistics(inputs)).U
        return _saliency(W.to(dtype).T, U).T

    def select(self, W: Tensor, pattern: Pattern, inputs: InputStats | None, generator: torch.Generator) -> Selection:
        """Mask and updated weights of `W` (d_out, d_in)."""
        U, damping = self.factor(W, statistics(inputs))
        mask, S = optimal_brain_surgery(W, U, pattern, self.block_size)
        return Selection(mask, S, damping)

    def factor(self, W: Tensor, inputs: InputStats) -> Factor:
        """U in the dtype to compute in, on the device of `W`; computed once for `inputs`."""
        dtype = compute_dtype(W.dtype)
        key = ("sparsegpt", self.damping, dtype, str(W.device))
        return inputs.cached(key, lambda: self._factorize(inputs, dtype, W.device))

    def _factorize(self, inputs: InputStats, dtype: torch.dtype, device: torch.device) -> Factor:
        if inputs.gram is None:
            raise UsageError("criterion 'sparsegpt' needs the Gram matrix of the inputs.")
        gram = inputs.gram.to(device, torch.float64)
        mean = float(gram.diagonal().mean()) or 1.0
        check_gram(gram)

        def attempt(damping: float) -> Tensor | None:
            H = gram.clone()
            H.diagonal().add_(damping * mean)
            return inverse_factor(H)

        U, damping = with_damping(attempt, self.damping, SMALLEST_DAMPING)
        if U is None:
            raise UsageError(
                f"the Gram matrix of the inputs is not positive definite with {damping:g} times its mean diagonal "
                "added to the diagonal, so it is no Gram matrix. Gather it again, in float64."
            )
        return Factor(U.to(dtype), damping)


def check_block_size(block_size: int) -> None:
    """Raise `UsageError` unless it is at least 1."""
    if block_size < 1:
        raise UsageError(f"block_size must be at least 1, got {block_size}. The paper uses 128.")


def optimal_brain_surgery(W: Tensor, U: Tensor, pattern: Pattern, block_size: int) -> tuple[Tensor, Tensor]:
    """The mask and the updated weights of `SparseGPT`, given its factor.

    Parameters
    ----------
    W : (d_out, d_in). Not modified.
    U : (d_in, d_in) upper triangular in the dtype to compute in, ``inv(H) = U.T @ U``. Scaling the columns of W and H
        alike changes no mask and scales S.
    pattern, block_size : as in `SparseGPT`.

    Returns
    -------
    mask, S : (d_out, d_in) bool; (d_out, d_in), zero off the mask, dtype of `U`.

    Raises
    ------
    NonFiniteError : the result holds NaN or infinity.
    """
    plan = _Plan.of(pattern, W.shape[0], W.shape[1], block_size)
    # One column of W is one row here, so that what is read and written together lies together.
    work = W.T.to(U.dtype, copy=True, memory_format=torch.contiguous_format)
    mask = torch.zeros(work.shape, dtype=torch.bool, device=W.device)
    if W.numel():
        errors = torch.empty_like(work[: plan.block])
        for start in range(0, W.shape[1], plan.block):
            stop = min(start + plan.block, W.shape[1])
            here = slice(start, stop)
            if not all_finite(_saliency(work[here], U[here, here])):
                raise _overflow("ranked weights by")
            _prune_block(work[here], U[here, here], mask[here], errors[: stop - start], plan, start)
            work[stop:].addmm_(U[here, stop:].T, errors[: stop - start], alpha=-1)
    S = torch.where(mask, work, 0).T.contiguous()
    if not all_finite(S):
        raise _overflow("updated weights to")
    return mask.T.contiguous(), S


class _Plan(NamedTuple):
    """How a pattern is chosen stretch by stretch.

    Attributes
    ----------
    block : columns of a block.
    stretch : columns whose mask is chosen at one time: the block, or a group of the pattern if that is narrower.
    span : columns over which a group of the pattern extends.
    by_row : whether every row (of units) has groups of its own.
    n_kept : units kept of a group.
    unit : (rows, columns) of a unit.
    """

    block: int
    stretch: int
    span: int
    by_row: bool
    n_kept: int
    unit: tuple[int, int]

    @classmethod
    def of(cls, pattern: Pattern, d_out: int, d_in: int, block_size: int) -> _Plan:
        group = pattern.group_size(d_out, d_in)
        cols = pattern.unit[1]
        by_row = group * cols <= d_in
        span = group * cols if by_row else d_in
        block = max(block_size // pattern.atom, 1) * pattern.atom
        return cls(block, min(span, block), span, by_row, pattern.n_kept(group), pattern.unit)

    def n_kept_between(self, start: int, stop: int) -> int:
        """Units that a group keeps between two columns: the sums from its start are rounded to the nearest."""
        begin = start - start % self.span
        upto = [(2 * self.n_kept * (column - begin) + self.span) // (2 * self.span) for column in (start, stop)]
        return upto[1] - upto[0]

    def choose(self, saliency: Tensor, start: int) -> Tensor:
        """The mask (columns, d_out) of a stretch that begins at column `start`, from its saliency, of that shape."""
        units = pool(saliency.T, self.unit)
        n_keep = self.n_kept_between(start, start + saliency.shape[0])
        groups = units if self.by_row else units.reshape(1, -1)
        return expand(keep_largest(groups, n_keep).reshape(units.shape), self.unit).T


def _prune_block(work: Tensor, U: Tensor, mask: Tensor, errors: Tensor, plan: _Plan, start: int) -> None:
    """Choose and prune the columns of a block; `work`, `mask`, `errors` (columns, d_out) are written, U is its own."""
    for begin in range(0, work.shape[0], plan.stretch):
        end = min(begin + plan.stretch, work.shape[0])
        here = slice(begin, end)
        mask[here] = plan.choose(_saliency(work[here], U[here, here]), start + begin)
        pruned = (~mask[here]).to(U.dtype) / U.diagonal()[here, None]
        _eliminate(work[here], U[here, here], pruned, errors[here])
        work[end:].addmm_(U[here, end:].T, errors[here], alpha=-1)


def _eliminate(work: Tensor, U: Tensor, pruned: Tensor, errors: Tensor) -> None:
    """Prune the columns of `work` (columns, d_out) in order; `pruned` is 1 / U_jj where the mask prunes, else 0."""
    n_columns = work.shape[0]
    if n_columns <= LEAF:
        for j in range(n_columns):
            torch.mul(work[j], pruned[j], out=errors[j])
            work[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
        return
    half = n_columns // 2
    _eliminate(work[:half], U[:half, :half], pruned[:half], errors[:half])
    work[half:].addmm_(U[:half, half:].T, errors[:half], alpha=-1)
    _eliminate(work[half:], U[half:, half:], pruned[half:], errors[half:])


def _overflow(what: str) -> NonFiniteError:
    return NonFiniteError(f"SparseGPT {what} NaN or infinity. Raise the damping, or check the weights.")


def _saliency(work: Tensor, U: Tensor) -> Tensor:
    """``w_j^2 / U_jj^2`` of `work` (columns, d_out): the rise of the error if the weight is pruned now."""
    return (work / U.diagonal()[:, None]).square()
