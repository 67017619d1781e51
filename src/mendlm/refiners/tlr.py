"""Targeted Low-rank Refinement (TLR), Algorithm 1 of the paper. [first cut: exact solver]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mendlm.linalg import truncate_svd
from mendlm.refiners._base import AbstractRefiner, Problem, Progress

Solver = Literal["auto", "subspace", "exact"]


@dataclass(frozen=True)
class TLR(AbstractRefiner):
    """Targeted Low-rank Refinement."""

    name: ClassVar[str] = "tlr"
    rank: int
    n_iter: int = 50
    solver: Solver = "auto"

    @property
    def max_steps(self) -> int:
        """The number of iterations T."""
        return self.n_iter if self.rank > 0 else 0

    def init(self, problem: Problem) -> Tensor:
        """The residual L = W - S of plain pruning."""
        return torch.where(problem.mask, 0, problem.W)

    def step(self, problem: Problem, state: Tensor, t: int) -> tuple[Tensor, Progress]:
        """One exact step."""
        r = 1 if self.n_iter == 1 else 1 + (self.rank - 1) * t // (self.n_iter - 1)
        U, sigma, Vh = truncate_svd(state, r)
        L = (U * sigma) @ Vh
        energy = float(sigma.square().sum() / state.square().sum().clamp_min(1e-300))
        new = torch.where(problem.mask, L, problem.W)
        return new, Progress(r, float((new - L).norm()), energy)

    def finish(self, problem: Problem, state: Tensor) -> tuple[Tensor, Tensor]:
        """Best rank-k approximation of the last residual."""
        U, sigma, Vh = truncate_svd(state, self.rank)
        root = sigma.sqrt()
        return U * root, root[:, None] * Vh
