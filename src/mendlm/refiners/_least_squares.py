"""The sparse step in the Gram metric: least squares over the kept entries, all rows at once."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class LeastSquares(NamedTuple):
    """S, the number of steps taken, and ``||(target - S) C||_F ** 2`` (0-dim)."""

    S: Tensor
    n_steps: int
    energy: Tensor


def masked_least_squares(
    target: Tensor, S: Tensor, kept: Tensor, correlation: Tensor, *, max_steps: int, rtol: float = 0.0
) -> LeastSquares:
    """Minimise ``||(target - S) C||_F`` over S that is zero where `kept` is, by conjugate gradients.

    Parameters
    ----------
    target, S : (d_out, d_in); `S` is where to start, zero off the mask.
    kept : (d_out, d_in), 1 on the mask and 0 off it, in the compute dtype.
    correlation : (d_in, d_in), ``C @ C.T`` with a unit diagonal (so that this is Jacobi-preconditioned).
    max_steps : products with `correlation`, one a step, after a first one.
    rtol : stop when a step lowers the squared objective by less than this share of it.

    Notes
    -----
    Rows are independent problems with one matrix, restricted to different sets of columns; each has its own step
    sizes. A step costs d_out d_in^2 multiply-adds and six passes over S. The objective never rises, up to rounding:
    there is no step along a direction d whose ``d.G d`` is no more than its own rounding, ``sqrt(d_in) eps |d|^2``,
    where the matrix is nearly singular; the row begins anew from its gradient.

    References
    ----------
    .. [1] Saad (2003), Iterative Methods for Sparse Linear Systems, 2nd ed., Algorithm 6.18.
    """
    finfo = torch.finfo(S.dtype)
    tiny, floor = finfo.tiny, finfo.eps * math.sqrt(S.shape[1])
    error = target - S
    gradient = error @ correlation
    scratch = torch.mul(error, gradient)
    energy = scratch.sum()
    residual = gradient.mul_(kept)
    direction, image, S = residual.clone(), error, S.clone()
    norms = torch.square(residual, out=scratch).sum(dim=1, keepdim=True)
    sizes = norms  # of the directions, squared, as if they were orthogonal to the residuals to the last digit
    n_steps = 0
    while n_steps < max_steps:
        n_steps += 1
        torch.mm(direction, correlation, out=image).mul_(kept)
        curvature = torch.mul(direction, image, out=scratch).sum(dim=1, keepdim=True)
        flat = curvature <= floor * sizes
        alpha = (norms / curvature.clamp_min(tiny)).masked_fill_(flat, 0)
        S.addcmul_(alpha, direction)
        residual.addcmul_(alpha, image, value=-1)
        gain = (alpha * norms).sum()
        energy = energy - gain
        if rtol > 0 and bool(gain <= rtol * energy):
            break
        following = torch.square(residual, out=scratch).sum(dim=1, keepdim=True)
        beta = (following / norms.clamp_min(tiny)).masked_fill_(flat, 0)
        direction.mul_(beta).add_(residual)
        sizes = following + beta.square() * sizes
        norms = following
    return LeastSquares(S, n_steps, energy)
