"""What alternating refiners share in the plain and the diagonal metric: the pruned entries of W, to be completed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mendlm.kernels.completion import complete
from mendlm.masks import zero_
from mendlm.refiners._base import Problem

# Of L. Measured at 4096 x 4096, one thread: a step takes 50 ms with 2 MB, 57 with 1 or 4, 71 with 8.
BLOCK_BYTES = 2**21


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

    def residual(self, L: Tensor, out: Tensor) -> Tensor:
        """``(1 - mask) * W + mask * L``, (d_out, d_in), into `out`, which must not be `L`."""
        for residual, part, W, mask in _blocks(out, L, self._W, self._mask):
            complete(part, W, mask, residual)
        return out

    def objective(self, L: Tensor) -> Tensor:
        """``||residual(L) - L||_F`` as a 0-dim tensor."""
        return _root([complete(*parts) for parts in _blocks(L, self._W, self._mask)], L)

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
        scratch, squares = torch.empty_like(out[: _n_rows(out)]), []
        for residual, factor, W, mask in _blocks(out, left, self._W, self._mask):
            L = torch.mm(factor, right, out=scratch[: factor.shape[0]])
            squares.append(complete(L, W, mask, residual))
        return _root(squares, out)


def _n_rows(x: Tensor) -> int:
    """Of a block that stays in the cache between two passes; all of them on other devices than a CPU."""
    return max(1, BLOCK_BYTES // max(1, x.shape[1] * x.itemsize)) if x.device.type == "cpu" else max(1, x.shape[0])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = _n_rows(tensors[0])
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)


def _root(squares: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(squares).sum().sqrt().to(like.dtype)
