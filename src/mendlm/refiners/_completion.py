"""What alternating refiners share in the plain and the diagonal metric: the pruned entries of W, to be completed."""

from __future__ import annotations

import torch
from torch import Tensor

from mendlm.masks import row_blocks, rows_of_block, zero_
from mendlm.refiners._base import Problem


class Completion:
    """The residual ``L = W - S`` as a function of a low-rank guess.

    Off the mask S is zero, so the residual is W; on the mask Algorithm 1 sets ``S = mask * (W - L_r)``, so the residual
    is L_r. Hence ``residual(L_r) = (1 - mask) * W + mask * L_r``: S itself is never formed during the iteration, and
    nothing of the size of W is held beside W and the mask.
    """

    def __init__(self, problem: Problem) -> None:
        self._W, self._mask = problem.W, problem.mask

    def pruned(self) -> Tensor:
        """``(1 - mask) * W``, the residual of plain pruning, as a new tensor."""
        return zero_(self._W.clone(), self._mask, off=False)

    def residual(self, L: Tensor, out: Tensor | None = None) -> Tensor:
        """``(1 - mask) * W + mask * L``, (d_out, d_in); `out` must not be `L`."""
        out = torch.empty_like(self._W) if out is None else out
        for target, W, mask, part in row_blocks(out, self._W, self._mask, L):
            _choose(mask, part, W, target)
        return out

    def objective(self, residual: Tensor, L: Tensor, out: Tensor | None = None) -> Tensor:
        """``||residual - L||_F`` as a 0-dim tensor, given ``residual(L)``; `out` may be `L` itself."""
        norm: Tensor = torch.linalg.vector_norm(torch.sub(residual, L, out=out))
        return norm

    def advance(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """``residual(left @ right)`` into `out`, and its `objective`, without forming the product as a whole.

        Parameters
        ----------
        left, right : (d_out, r) and (r, d_in).
        out : (d_out, d_in).

        Returns
        -------
        0-dim tensor.
        """
        d_out, d_in = out.shape
        scratch = out.new_empty(min(rows_of_block(out), d_out), d_in)
        norms = []
        for residual, factor, W, mask in row_blocks(out, left, self._W, self._mask):
            L = torch.mm(factor, right, out=scratch[: factor.shape[0]])
            _choose(mask, L, W, residual)
            norms.append(self.objective(residual, L, out=L))
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


def _choose(mask: Tensor, L: Tensor, W: Tensor, out: Tensor) -> None:
    """`L` where the bool `mask` is True and `W` elsewhere, into `out`."""
    if mask.device.type == "cpu":
        # With weights of 0 and 1 an exact choice, and 15 times faster than torch.where.
        torch.lerp(W, L, mask.to(W.dtype), out=out)
    else:
        torch.where(mask, L, W, out=out)
