"""Dense linear algebra for low-rank approximation; nothing here knows about pruning.

Shapes: a matrix M (d_out, d_in) has factors `left` (d_out, r) and `right` (r, d_in), M ≈ left @ right.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype, requested: torch.dtype | None = None) -> torch.dtype:
    """Dtype to compute in: `requested` if given, else float64 for float64 and float32 for everything smaller."""
    if requested is not None:
        return requested
    return torch.float64 if dtype == torch.float64 else torch.float32


def truncate_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-`rank` approximation of `M` in Frobenius norm, by a full SVD.

    Parameters
    ----------
    M : (d_out, d_in), float32 or float64. Not modified.
    rank : int, 0 <= rank <= min(d_out, d_in).

    Returns
    -------
    U, sigma, Vh : (d_out, rank), (rank,), (rank, d_in); sigma non-increasing. Signs are LAPACK's.

    Notes
    -----
    Cost O(d_out * d_in * min(d_out, d_in)) flops with a large constant (LAPACK gesdd; cuSOLVER on CUDA).
    """
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank], sigma[:rank], Vh[:rank]
