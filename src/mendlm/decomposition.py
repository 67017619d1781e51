"""The result of a refinement: W ≈ S + B @ A."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def merge(S: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """``S + B @ A`` (d_out, d_in), computed in at least float32 and rounded once, to `dtype`."""
    from mendlm.linalg import compute_dtype

    wide = compute_dtype(S.dtype)
    return torch.addmm(S.to(wide), B.to(wide), A.to(wide)).to(dtype)


@dataclass(frozen=True)
class SparseLowRank:
    """A matrix as sparse + low-rank.

    Attributes
    ----------
    S : (d_out, d_in), storage dtype, zero off the mask.
    B : (d_out, rank), storage dtype.
    A : (rank, d_in), storage dtype.
    mask : (d_out, d_in) bool, True = kept. A kept entry of S may itself be zero.
    """

    S: Tensor
    B: Tensor
    A: Tensor
    mask: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of B and rows of A."""
        return self.A.shape[0]

    def to_dense(self) -> Tensor:
        """S + B @ A, (d_out, d_in), computed in at least float32."""
        from mendlm.linalg import compute_dtype

        dtype = compute_dtype(self.S.dtype)
        return self.S.to(dtype) + self.B.to(dtype) @ self.A.to(dtype)
