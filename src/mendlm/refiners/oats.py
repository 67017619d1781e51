"""OATS: alternating thresholding, in which the mask moves too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.linalg import LeadingTriplets, Solver, Triplets, balance, make_solver
from mendlm.masks import mask_of_largest, zero_
from mendlm.metrics import MetricName
from mendlm.patterns import Pattern
from mendlm.refiners._base import AbstractRefiner, Problem, Progress, pattern_of
from mendlm.refiners.tlr import check_iterations


@dataclass
class _State:
    solver: LeadingTriplets
    pattern: Pattern
    S: Tensor
    mask: Tensor
    fitted: Triplets | None = None


@dataclass(frozen=True)
class OATS(AbstractRefiner):
    """Alternate between the best rank-k L for a given S and the best S of the pattern, wherever its entries are.

        L = SVD_k(W D - S);   S = threshold(W D - L)

    The threshold keeps the largest entries that the pattern allows, always the same number of them. The mask that is
    given is not used: S starts at zero.

    Parameters
    ----------
    rank : k, 0 <= k <= min(d_out, d_in). 0 keeps the largest entries of W D.
    n_iter : N >= 1; the paper uses 80.
    solver : as for `TLR`; "exact" is the paper's, a full SVD in every iteration.

    Raises
    ------
    UsageError : n_iter < 1, an unknown solver, or a `Problem` without a pattern.

    Notes
    -----
    D is that of the diagonal metric, the root mean squares of the inputs; in the plain metric there is none. A step
    costs 6 d_out d_in k flops and one selection of entries (`mask_of_largest`), which dominates at small rank.

    References
    ----------
    .. [1] Zhang, Papyan (2025), OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition, ICLR 2025,
       arXiv:2409.13652, Algorithms 1 (alternating thresholding) and 2. Deviations: rank and sparsity are given apart
       and not by a compression rate and a rank ratio; a warm-started subspace iteration in place of the SVD; after the
       factors are rounded S is fitted to them on the final mask.
    """

    name: ClassVar[str] = "oats"
    metrics: ClassVar[tuple[str, ...]] = ("plain", "diagonal")
    calibrated_metric: ClassVar[MetricName] = "diagonal"
    moves_mask: ClassVar[bool] = True
    rank: int
    n_iter: int = 80
    solver: Solver = "auto"

    def __post_init__(self) -> None:
        check_iterations(self.n_iter, self.solver)

    @property
    def max_steps(self) -> int:
        """N, or 1 if the rank is 0."""
        return self.n_iter if self.rank > 0 else 1

    def init(self, problem: Problem) -> _State:
        """S = 0."""
        pattern, W = pattern_of(problem, self.name), problem.W
        solver = make_solver(self.solver, W.shape, self.rank, like=W, generator=problem.generator)
        return _State(solver, pattern, torch.zeros_like(W), problem.mask)

    def step(self, problem: Problem, state: _State, t: int) -> tuple[_State, Progress]:
        """One iteration."""
        W = problem.W
        energy_frac = 0.0
        L = torch.zeros_like(W)
        if self.rank > 0:
            state.fitted = state.solver.leading(W - state.S, self.rank)
            L = torch.mm(state.fitted.left, state.fitted.right)
            energy_frac = float(state.fitted.energy_frac)
        error = W - L
        state.mask = mask_of_largest(error, state.pattern)
        zero_(state.S.copy_(error), state.mask, off=True)
        return state, Progress(self.rank, float(torch.linalg.vector_norm(error - state.S)), energy_frac)

    def finish(self, problem: Problem, state: _State) -> tuple[Tensor, Tensor]:
        """The factors of the last iteration, which the last mask was chosen for."""
        if state.fitted is None:
            return problem.no_factors
        return balance(state.fitted.left, state.fitted.right)

    def final_S(self, problem: Problem, state: _State) -> Tensor | None:
        """None: without a low-rank part S is ``mask * W``, whatever a criterion made of the weights."""
        return None

    def final_mask(self, problem: Problem, state: _State) -> Tensor:
        """The last one."""
        return state.mask
