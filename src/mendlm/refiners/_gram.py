"""Alternation in the Gram metric: S on the mask and L of rank r that minimise ``||(W - S - L) C||_F``, G = C @ C.T."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mendlm.linalg import LeadingTriplets, balance
from mendlm.metrics import GramMetric
from mendlm.refiners._base import Problem, Progress

# Two search directions count as one if the square of the sine between them is below this.
COLLINEAR = 1e-5


class GramAlternation:
    """L and S by turns: L exactly, S by one step of a preconditioned conjugate gradient method that is never restarted.

    With the residual ``E = W - S`` the best L of rank r is ``Q @ (Q.T @ E)``, Q the leading left singular vectors of
    ``E C``. What is left is a function of S alone, ``f(S) = sum of sigma_i(E C)^2 over i > r``, with the negative half
    gradient

        g = mask * ((E - L) G) = mask * (E G - Q @ (Q.T @ E G)).

    A step moves S within the span of g and the last step D, to the minimum of ``||(1 - Q Q.T)(W - S) C||^2``. That
    quadratic has the left factor of L fixed and the right one free; it lies above f and touches it at S, so that f
    falls with every step at constant rank. In the scaled columns of the metric G has a unit diagonal: g is
    preconditioned by it.

    Parameters
    ----------
    problem : in the scaled columns of its metric; S begins with `Problem.start`.
    metric : that of `problem`.
    solver : of the weighted problem (`mendlm.linalg`).

    Attributes
    ----------
    change : share of the objective by which the last step changed it.

    Notes
    -----
    E G is carried along, so that a step costs one product with G, 2 d_out d_in^2 flops, and thin ones of
    2 d_out d_in (9 r + 3 OVERSAMPLING) flops. Memory: eight copies of W. In float32 the carried product drifts where
    inputs differ by orders of magnitude and the damping is tiny, and with it the objective that is reported for a step,
    which then may rise; that of the result is measured anew.

    Measured on layers of SmolLM2-135M (rank 16, 50 products with G): least squares for S with 2 restarted steps per
    iteration ends 1 to 5 % higher; step sizes by row for a fixed L 0.1 to 1 %; a memory of 4 steps in place of the
    last one, and other preconditioners (leading eigenvectors of G, inverted per row; powers of G), within 1 % of this.

    References
    ----------
    .. [1] Golub, Pereyra (2003), Separable nonlinear least squares: the variable projection method and its
       applications, Inverse Problems 19.
    .. [2] Knyazev (2001), Toward the optimal preconditioned eigensolver, SIAM Journal on Scientific Computing 23(2):
       the minimum over the span of the preconditioned gradient and the last step.
    """

    def __init__(self, problem: Problem, metric: GramMetric, solver: LeadingTriplets) -> None:
        W = problem.W
        self._W, self._solver = W, solver
        self._G = metric.parts()[0]
        self._kept = problem.mask.to(W.dtype)
        self._E = W * (1 - self._kept) if problem.start is None else W - problem.start
        self._EG = self._E @ self._G
        self._D, self._DG = torch.zeros_like(W), torch.zeros_like(W)
        self._g, self._gG, self._scratch = torch.empty_like(W), torch.empty_like(W), torch.empty_like(W)
        self._objective = math.inf
        self.change = math.inf

    def step(self, rank: int) -> Progress:
        """The best L of rank `rank`, then one step of S."""
        left, right, energy_frac, weighted = self._solver.leading(self._E, rank, self._EG)
        D, DG = self._D, self._DG
        g = torch.addmm(self._EG, left, weighted, alpha=-1, out=self._g)  # (E - L) G
        # <L, g> would be zero if the left factor were orthonormal to the last digit.
        squared = self._dot(self._E, g) - (right * (left.T @ g)).sum()
        g.mul_(self._kept)
        gG = torch.mm(g, self._G, out=self._gG)

        in_gG, in_D = left.T @ gG, left.T @ D
        values = torch.stack(
            [
                squared,
                energy_frac,
                torch.linalg.vector_norm(g).square(),
                self._dot(g, D),
                self._dot(g, gG) - (left.T @ g).mul_(in_gG).sum(),
                self._dot(D, gG) - in_gG.mul_(in_D).sum(),
                self._dot(D, DG) - (left.T @ DG).mul_(in_D).sum(),
            ]
        ).tolist()
        before, energy = values[0], values[1]
        along_g, along_D, gain = _best_step(*values[2:])
        D.mul_(along_D).add_(g, alpha=along_g)
        DG.mul_(along_D).add_(gG, alpha=along_g)
        self._E.sub_(D)
        self._EG.sub_(DG)

        after = before - gain
        objective = math.sqrt(max(after, 0.0)) if math.isfinite(after) else after
        self.change = abs(self._objective - objective) / max(objective, torch.finfo(D.dtype).tiny)
        self._objective = objective
        return Progress(rank, objective, energy)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best L of rank `rank` for S as it is, (d_out, rank), (rank, d_in)."""
        fitted = self._solver.final(self._E, rank, self._EG)
        return balance(fitted.left, fitted.right)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        """``<a, b>``, 0-dim; summed by pairs, as `torch.dot` does not, and without fresh memory, which costs more."""
        return torch.mul(a, b, out=self._scratch).sum()

    @property
    def S(self) -> Tensor:
        """(d_out, d_in), zero off the mask, in scaled columns."""
        return (self._W - self._E).mul_(self._kept)


def _best_step(b1: float, b2: float, a11: float, a12: float, a22: float) -> tuple[float, float, float]:
    """The x with the largest gain ``2 b.x - x.A x``, and the gain; on the first axis if A is nearly singular."""
    if not a11 > 0:
        return 0.0, 0.0, 0.0
    determinant = a11 * a22 - a12 * a12
    if not determinant > COLLINEAR * a11 * a22:
        return b1 / a11, 0.0, b1 * b1 / a11
    x1 = (a22 * b1 - a12 * b2) / determinant
    x2 = (a11 * b2 - a12 * b1) / determinant
    return x1, x2, b1 * x1 + b2 * x2
