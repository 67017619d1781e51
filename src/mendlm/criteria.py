"""Pruning criteria: (W, generator) -> scores of the same shape; the largest scores are kept.

A new criterion is one function here and one line in `CRITERIA`; the contract tests then cover it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, torch.Generator], Tensor]


def magnitude(W: Tensor, generator: torch.Generator) -> Tensor:
    """|W|, in the dtype of `W`. Han et al. (2015), arXiv:1506.02626, Section 3. No random choice."""
    return W.abs()


def random(W: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform scores in [0, 1), float32, drawn from `generator`; the baseline any criterion has to beat."""
    scores = torch.rand(W.shape, generator=generator, dtype=torch.float32, device=generator.device)
    return scores.to(W.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "random": random}
