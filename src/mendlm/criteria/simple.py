"""Criteria that look at the weights alone: magnitude, and random as the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion
from mendlm.inputs import InputStats


@dataclass(frozen=True)
class Magnitude(AbstractCriterion):
    """|W|, in the dtype of `W`. Han et al. (2015), arXiv:1506.02626, Section 3. No random choice."""

    name: ClassVar[str] = "magnitude"

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """|W|."""
        return W.abs()


@dataclass(frozen=True)
class Random(AbstractCriterion):
    """Uniform scores in [0, 1), float32; the baseline any criterion has to beat."""

    name: ClassVar[str] = "random"

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """Drawn from `generator`."""
        scores = torch.rand(W.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return scores.to(W.device)
