"""What all alternating refiners share: the best S on the mask for a given L, as a residual that L is fitted to next."""

from __future__ import annotations

import torch
from torch import Tensor

from mendlm.metrics import GramMetric
from mendlm.refiners._base import Problem
from mendlm.refiners._least_squares import masked_least_squares

# Conjugate-gradient steps for S between two low-rank steps. Each costs one product with the Gram matrix. S is warm, so
# that a few steps follow L closely: see docs/refiners.md for the measurement.
INNER_STEPS = 3


class Completion:
    """The residual ``L = W - S`` as a function of a low-rank guess, in the plain and the diagonal metric.

    Off the mask S is zero, so the residual is W; on the mask Algorithm 1 sets ``S = mask * (W - L_r)``, so the residual
    is L_r. Hence ``residual(L_r) = (1 - mask) * W + mask * L_r``: S itself is never formed during the iteration.

    Attributes
    ----------
    pruned : the residual of the S that the criterion left.

    Notes
    -----
    The mask is kept as a tensor of 0 and 1 in the compute dtype: on a CPU ``addcmul`` with it is 15 times faster than
    ``torch.where`` with a bool mask (28 against 540 microseconds for 576 x 576), which would cost as much as the
    matrix products at rank 128.
    """

    def __init__(self, problem: Problem) -> None:
        self._kept = problem.mask.to(problem.W.dtype)
        self.pruned = problem.W * (1 - self._kept)

    def residual(self, L: Tensor, out: Tensor | None = None) -> Tensor:
        """``(1 - mask) * W + mask * L``, (d_out, d_in); `out` must not be `L`."""
        return torch.addcmul(self.pruned, self._kept, L, out=out)

    def objective(self, residual: Tensor, L: Tensor, out: Tensor | None = None) -> Tensor:
        """``||residual - L||_F`` as a 0-dim tensor, given ``residual(L)``; `out` may be `L` itself."""
        norm: Tensor = torch.linalg.vector_norm(torch.sub(residual, L, out=out))
        return norm


class GramCompletion(Completion):
    """The same in the Gram metric: S minimises ``||(W - L - S) C||_F`` over the mask, and residuals are whitened.

    S is not exact but a few conjugate-gradient steps better than before, from where the last call left it, so that the
    objective falls with every call for the same L.

    Notes
    -----
    A call of `residual` costs ``INNER_STEPS + 2`` products of (d_out, d_in) by (d_in, d_in) and a triangular solve.
    """

    def __init__(self, problem: Problem, metric: GramMetric) -> None:
        super().__init__(problem)
        self._W, self._metric = problem.W, metric
        self.S = problem.W * self._kept if problem.start is None else problem.start.clone()
        self.pruned = metric.whiten(problem.W - self.S)

    def residual(self, L: Tensor, out: Tensor | None = None) -> Tensor:
        """``(W - S) C`` with S fitted to the whitened `L`."""
        correlation, factor = self._metric.parts()
        target = self._W - self._metric.unwhiten(L)
        self.S = masked_least_squares(target, self.S, self._kept, correlation, max_steps=INNER_STEPS).S
        return torch.mm(self._W - self.S, factor, out=out)


def make_completion(problem: Problem) -> Completion:
    """The completion for the metric of a problem."""
    metric = problem.metric
    return GramCompletion(problem, metric) if isinstance(metric, GramMetric) else Completion(problem)
