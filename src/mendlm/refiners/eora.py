"""EoRA: what pruning took away, compensated in the eigenspace of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.linalg import truncate_svd
from mendlm.metrics import GramMetric, MetricName
from mendlm.refiners._base import OneStepRefiner, Problem, Progress, gram_of


@dataclass(frozen=True)
class EoRA(OneStepRefiner):
    """The rank-k compensation of ``E = W - S`` with the least error of the outputs, in closed form; S stays.

    With the eigendecomposition ``G = Q diag(values) Q.T`` of the Gram matrix of the inputs

        U, sigma, Vh = svd(E Q sqrt(values));   L = U_k diag(sigma_k) Vh_k sqrt(values)^-1 Q.T

    S is ``mask * W``, or what a criterion that updates weights (SparseGPT) made of it.

    Parameters
    ----------
    rank : k, 0 <= k <= min(d_out, d_in); 0 is plain pruning.

    Raises
    ------
    UsageError : when it is applied, a metric other than the Gram metric.

    Notes
    -----
    One symmetric eigendecomposition of G, once for all weights with the same inputs (float64, some 9 d_in^3 flops), and
    one full SVD. Directions in which the inputs are zero up to rounding are left alone: there ``1 / sqrt(values)`` is
    taken as 0. `ZeroShotSVD` with ``refit=False`` gives the same L in the Gram metric from the left singular vectors
    alone, without the eigendecomposition.

    References
    ----------
    .. [1] Liu et al. (2024), EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank
       Approximation, arXiv:2410.21271, Section 3, Algorithm 1. Deviations: the Gram matrix is damped, and its columns
       are scaled to a unit diagonal, which changes the eigenvectors but not L; eigenvalues that are not positive count
       as zero, where its code raises them to the smallest positive one.
    """

    name: ClassVar[str] = "eora"
    metrics: ClassVar[tuple[str, ...]] = ("gram",)
    calibrated_metric: ClassVar[MetricName] = "gram"
    rank: int

    @property
    def refits_S(self) -> bool:
        """No: S is the criterion's."""
        return False

    def step(self, problem: Problem, state: tuple[Tensor, Tensor], t: int) -> tuple[tuple[Tensor, Tensor], Progress]:
        """The whole method."""
        lost = problem.lost
        project, back = _eigenspace(gram_of(problem, self.name))
        projected = lost @ project
        U, sigma, Vh = truncate_svd(projected, self.rank)
        root = sigma.sqrt()
        left, right = U * root, (root[:, None] * Vh) @ back
        objective = float(problem.metric.norm_of_scaled(lost - left @ right))
        total = float(projected.square().sum())
        energy = float(sigma.square().sum()) / total if total > 0 else 1.0
        return (left, right), Progress(self.rank, objective, energy)


def _eigenspace(metric: GramMetric) -> tuple[Tensor, Tensor]:
    """``Q sqrt(values)`` and its pseudo-inverse ``sqrt(values)^-1 Q.T``, (d_in, d_in) each."""
    values, vectors = metric.eigen
    smallest = values.max().clamp_min(0) * torch.finfo(values.dtype).eps * values.numel() if values.numel() else 0
    usable = values > smallest
    root = torch.where(usable, values, 0).sqrt()
    inverse = torch.where(usable, 1 / torch.where(usable, root, 1), 0)
    return vectors * root, inverse[:, None] * vectors.T
