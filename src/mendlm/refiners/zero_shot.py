"""Zero-shot SVD: the low-rank part of what plain pruning removed, in one step; and no low-rank part at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.linalg import truncate_svd
from mendlm.refiners._base import AbstractRefiner, Problem, Progress


@dataclass(frozen=True)
class ZeroShotSVD(AbstractRefiner):
    """``L`` = best rank-k approximation of the pruned entries ``(1 - mask) * W``.

    Parameters
    ----------
    rank : k, 0 <= k <= min(d_out, d_in); 0 is plain pruning.
    refit : fit S to L on the mask, as every other refiner does. False is the published baseline: S stays
        ``mask * W``, so that L disturbs the kept entries. Refitting alone is worth most of what TLR gains at small
        rank (SmolLM2-135M, magnitude 50 %, k = 16; see docs/benchmarks.md).

    Notes
    -----
    One full SVD.

    References
    ----------
    .. [1] Shen et al. (2025), ICML 2025, the "zero-shot SVD" baseline. Deviation: `refit` is on unless turned off.
    """

    name: ClassVar[str] = "zero-shot-svd"
    rank: int
    refit: bool = True

    @property
    def max_steps(self) -> int:
        """One."""
        return 1

    @property
    def refits_S(self) -> bool:
        """As asked for."""
        return self.refit

    def init(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Empty factors."""
        W = problem.W
        return W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])

    def step(self, problem: Problem, state: tuple[Tensor, Tensor], t: int) -> tuple[tuple[Tensor, Tensor], Progress]:
        """The whole method."""
        pruned = torch.where(problem.mask, 0, problem.W)
        U, sigma, Vh = truncate_svd(pruned, self.rank)
        root = sigma.sqrt()
        left, right = U * root, root[:, None] * Vh
        objective = float(torch.where(problem.mask, 0, problem.W - left @ right).norm())
        total = float(pruned.square().sum())
        energy = float(sigma.square().sum()) / total if total > 0 else 1.0
        return (left, right), Progress(self.rank, objective, energy)

    def finish(self, problem: Problem, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors found."""
        return state


@dataclass(frozen=True)
class PruneOnly(AbstractRefiner):
    """No low-rank part: ``S = mask * W``. The baseline that every refiner has to beat."""

    name: ClassVar[str] = "none"
    rank: int = 0

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
        W = problem.W
        return W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])
