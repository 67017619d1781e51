"""Criteria that look at the weights alone: magnitude, and random as the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion
from mendlm.inputs import InputStats
from mendlm.masks import row_blocks


@dataclass(frozen=True)
class Magnitude(AbstractCriterion):
    """|W|; among equal magnitudes the entry of the smaller column counts more.

    Weights that were quantized once are full of ties: in 15 % of the 2:4 groups of SmolLM2-135M-Instruct (4 bits) the
    threshold falls between equals. Settling them by position prunes the same columns in every row, and errors that
    agree add up: perplexity 3601 where the earlier entry stays, 1725 where the later one, 2282 at random, 1463 by
    column (2:4, nothing mended, 2 windows of 2048 tokens of WikiText-2).

    Parameters
    ----------
    ties : "column" keeps the entry whose column has the smaller norm, of which it is the larger share (as in RIA's
        relative importance), "position" the one that comes first. float64 weights are always settled by position.

    References
    ----------
    .. [1] Han et al. (2015), arXiv:1506.02626, Section 3, which says nothing about ties.
    """

    name: ClassVar[str] = "magnitude"
    ties: Literal["column", "position"] = "column"

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """|W|, and by column in float64: times up to ``1 + 2 ** -26``, less than two float32 values can differ by."""
        if self.ties == "position" or W.dtype == torch.float64 or not W.numel():
            return W.abs()
        # By blocks, as torch reduces a converted matrix along columns ten times slower.
        norms = torch.stack([part.double().square_().sum(dim=0) for (part,) in row_blocks(W)]).sum(dim=0).sqrt()
        share = 1 - norms / norms.max().clamp_min(torch.finfo(torch.float64).tiny)
        scores: Tensor = W.double().abs_().mul_(1 + share * 2.0**-26)  # of a W that is not float64: a copy
        return scores


@dataclass(frozen=True)
class Random(AbstractCriterion):
    """Uniform scores in [0, 1), float32; the baseline any criterion has to beat."""

    name: ClassVar[str] = "random"

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """Drawn from `generator`."""
        scores = torch.rand(W.shape, generator=generator, dtype=torch.float32, device=generator.device)
        return scores.to(W.device)
