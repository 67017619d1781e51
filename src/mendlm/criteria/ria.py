"""RIA: relative importance of weights, times a power of the norms of their inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion, Needs, statistics
from mendlm.errors import UsageError
from mendlm.inputs import InputStats
from mendlm.linalg import compute_dtype
from mendlm.patterns import Scope


@dataclass(frozen=True)
class RIA(AbstractCriterion):
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) ||X_j||_2^a, float32 (float64 for float64 `W`).

    A weight counts by its share of its row and of its column, so that no input or output goes because all its weights
    are small. One whose weights are all alike can: in the tensor scope it loses all from some sparsity on.

    Parameters
    ----------
    activation_power : a >= 0; the paper takes 0.5. With 0 the inputs do not matter (the paper's "RI").

    Raises
    ------
    UsageError : a is negative or not finite.

    Notes
    -----
    Two passes over W. A row or column of zeros has score 0 (the formula has 0 / 0). As in `Wanda` the root mean square
    stands for the norm.

    References
    ----------
    .. [1] Zhang et al. (2024), Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models,
       ICLR 2024, the definitions of RI and RIA. Its code (lib/prune.py, ``prune_ria``) compares within the tensor
       unless told otherwise; so does the default here. Without the paper's channel permutation for n:m.
    """

    name: ClassVar[str] = "ria"
    needs: ClassVar[Needs] = "second_moment"
    default_scope: ClassVar[Scope] = "tensor"
    activation_power: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.activation_power) and self.activation_power >= 0):
            raise UsageError(f"activation_power must be a number >= 0, got {self.activation_power!r}.")

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """Share of the row plus share of the column, times the powered scale."""
        size = W.abs().to(compute_dtype(W.dtype))
        if size.numel():
            size = size / size.amax().clamp_min(torch.finfo(size.dtype).tiny)  # no sum of a row overflows
        shares = size / _divisor(size.sum(dim=1, keepdim=True)) + size / _divisor(size.sum(dim=0))
        power = statistics(inputs).scale.pow(self.activation_power).to(size.device, size.dtype)
        return shares * power


def _divisor(sums: Tensor) -> Tensor:
    """`sums`, 1 where they are 0."""
    return torch.where(sums > 0, sums, 1)
