"""Wanda: weights times the norms of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mendlm.criteria._base import AbstractCriterion, Needs, statistics
from mendlm.inputs import InputStats
from mendlm.linalg import compute_dtype
from mendlm.patterns import Scope


@dataclass(frozen=True)
class Wanda(AbstractCriterion):
    """|W_ij| ||X_j||_2, float32 (float64 for float64 `W`); weights compete within their row.

    Notes
    -----
    One pass over W. ||X_j||_2 / sqrt(n_tokens), the root mean square, stands for the norm: a factor that is common to a
    tensor changes no mask.

    References
    ----------
    .. [1] Sun et al. (2023), A Simple and Effective Pruning Approach for Large Language Models, arXiv:2306.11695,
       eq. 1; comparison by row: Section 3.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[Needs] = "second_moment"
    default_scope: ClassVar[Scope] = "row"

    def scores(self, W: Tensor, inputs: InputStats | None, generator: torch.Generator) -> Tensor:
        """|W| * scale of the inputs."""
        dtype = compute_dtype(W.dtype)
        return W.abs().to(dtype) * statistics(inputs).scale.to(W.device, dtype)
