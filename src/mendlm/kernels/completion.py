"""A low-rank guess L of W completed on the mask, and how far it is from L: in one pass over memory where C does it."""

from __future__ import annotations

import torch
from torch import Tensor

from mendlm.kernels import _cpu


def complete(L: Tensor, W: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """L where the mask is True and W elsewhere, into `out` if it is given.

    Parameters
    ----------
    L, W : (d_out, d_in), of one floating dtype.
    mask : (d_out, d_in) bool, True = kept.
    out : (d_out, d_in), not `L`.

    Returns
    -------
    (2,): the sums of the squares of what was completed less L, and of what was completed. float64 from the C kernel,
    the dtype of L without it; `out` does not depend on which of them it was.
    """
    if serves(L, W, mask, *(() if out is None else (out,))):
        return torch.tensor(_cpu.complete(L, W, mask, out), dtype=torch.float64)
    chosen = torch.empty_like(L) if out is None else out
    if mask.device.type == "cpu":
        # With weights of 0 and 1 an exact choice, and 15 times faster than torch.where.
        torch.lerp(W, L, mask.to(W.dtype), out=chosen)
    else:
        torch.where(mask, L, W, out=chosen)
    return torch.stack([torch.linalg.vector_norm(x).square() for x in (torch.sub(chosen, L), chosen)])


def serves(*tensors: Tensor) -> bool:
    """Whether the C kernel takes these; the version in plain C is slower than torch."""
    return (
        _cpu.unavailable() is None
        and len(_cpu.isas()) > 1
        and all(
            t.device.type == "cpu" and t.dtype in (torch.float32, torch.bool) and (t.stride(1) == 1 or t.shape[1] < 2)
            for t in tensors
        )
    )
