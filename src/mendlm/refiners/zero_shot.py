"""Zero-shot SVD: the low-rank part of what plain pruning removed, in one step; and no low-rank part at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.errors import UsageError
from mendlm.linalg import FullSVD, balance, truncate_svd
from mendlm.metrics import GramMetric, MetricName
from mendlm.refiners._base import AbstractRefiner, OneStepRefiner, Problem, Progress


@dataclass(frozen=True)
class ZeroShotSVD(OneStepRefiner):
    """``L`` = best rank-k approximation, in the metric, of what pruning took away, ``W - S``.

    S is ``mask * W``, or what a criterion that updates weights (SparseGPT) made of it. In the Gram metric with
    ``refit=False`` this is what `EoRA` computes, without an eigendecomposition.

    Parameters
    ----------
    rank : k, 0 <= k <= min(d_out, d_in); 0 is plain pruning.
    refit : fit S to L on the mask, as every other refiner does. False is the published baseline: S stays as it is,
        so that L disturbs the kept entries. Refitting alone is worth most of what TLR gains at small
        rank (SmolLM2-135M, magnitude 50 %, k = 16; see docs/benchmarks.md).

    Notes
    -----
    One full SVD.

    References
    ----------
    .. [1] Shen et al. (2025), ICML 2025, the "zero-shot SVD" baseline. Deviation: `refit` is on unless turned off.
    """

    name: ClassVar[str] = "zero-shot-svd"
    calibrated_metric: ClassVar[MetricName] = "plain"
    rank: int
    refit: bool = True

    @property
    def refits_S(self) -> bool:
        """As asked for."""
        return self.refit

    def step(self, problem: Problem, state: tuple[Tensor, Tensor], t: int) -> tuple[tuple[Tensor, Tensor], Progress]:
        """The whole method."""
        metric = problem.metric
        lost = problem.lost
        if isinstance(metric, GramMetric):
            G, root = metric.parts()
            found = FullSVD(root).leading(lost, self.rank, lost @ G)
            objective = float(torch.linalg.vector_norm(metric.whiten(lost - found.left @ found.right)))
            return balance(found.left, found.right), Progress(self.rank, objective, float(found.energy_frac))
        U, sigma, Vh = truncate_svd(lost, self.rank)
        left, right = U * sigma.sqrt(), sigma.sqrt()[:, None] * Vh
        error = lost - left @ right
        objective = float(torch.linalg.vector_norm(error * ~problem.mask if self.refit else error))
        total = float(lost.square().sum())
        energy = float(sigma.square().sum()) / total if total > 0 else 1.0
        return (left, right), Progress(self.rank, objective, energy)


@dataclass(frozen=True)
class PruneOnly(AbstractRefiner):
    """No low-rank part: ``S = mask * W``, or what the criterion made of it. The baseline of every refiner.

    In the Gram metric S is fitted: the best weights for the mask.

    Parameters
    ----------
    rank : 0.

    Raises
    ------
    UsageError : another rank.
    """

    name: ClassVar[str] = "none"
    calibrated_metric: ClassVar[MetricName] = "plain"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank != 0:
            raise UsageError(f"refiner 'none' has no low-rank part, got rank {self.rank!r}. Leave rank out.")

    @property
    def max_steps(self) -> int:
        """None."""
        return 0

    def init(self, problem: Problem) -> None:
        """Nothing to prepare."""

    def step(self, problem: Problem, state: None, t: int) -> tuple[None, Progress]:
        """Never called: `max_steps` is 0."""
        raise NotImplementedError

    def finish(self, problem: Problem, state: None) -> tuple[Tensor, Tensor]:
        """Empty factors."""
        return problem.no_factors
