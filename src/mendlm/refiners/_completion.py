"""What alternating refiners share in the plain and the diagonal metric: the pruned entries of W, to be completed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mendlm.kernels.completion import complete
from mendlm.masks import zero_

# Of L, which a CPU's cache holds from the product to the choice: 2 MB in float32. At 4096 x 11008 and rank 128 the
# product takes 184 ms by such tiles (one thread), 210 by 256 x 2048, 354 by 47 whole rows, and 318 at once.
TILE = 512, 1024


class Completion:
    """The residual ``L = W - S`` as a function of a low-rank guess.

    Off the mask S is zero, so the residual is W; on the mask Algorithm 1 sets ``S = mask * (W - L_r)``, so the residual
    is L_r. Hence ``residual(L_r) = (1 - mask) * W + mask * L_r``: S itself is never formed during the iteration, and
    nothing of the size of W is held beside W and the mask; for a stack of matrices the product is.
    """

    def __init__(self, W: Tensor, mask: Tensor) -> None:
        self._W, self._mask = W, mask

    def pruned(self) -> Tensor:
        """``(1 - mask) * W``, the residual of plain pruning, as a new tensor."""
        return zero_(self._W.clone(), self._mask, off=False)

    def residual(self, L: Tensor, out: Tensor) -> Tensor:
        """``(1 - mask) * W + mask * L``, (d_out, d_in), into `out`, which must not be `L`."""
        for target, part, W, mask in _tiles(out, L, self._W, self._mask):
            complete(part, W, mask, target)
        return out

    def objective(self, L: Tensor) -> Tensor:
        """``||residual(L) - L||_F`` as a 0-dim tensor."""
        return _roots([complete(*tiles) for tiles in _tiles(L, self._W, self._mask)], L)[0]

    def advance(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``residual(left @ right)`` into `out` if it is given, without forming the whole product.

        Parameters
        ----------
        left, right : (…, d_out, r) and (…, r, d_in).
        out : (…, d_out, d_in).

        Returns
        -------
        objective : of left @ right, a 0-dim tensor; (n,) of a stack.
        norm : of the residual, ``||residual(left @ right)||_F``, likewise.
        """
        if self._W.ndim == 3:
            L = torch.bmm(left, right)
            found = torch.where(self._mask, L, self._W, out=torch.empty_like(L) if out is None else out)
            objective, norm = (torch.linalg.vector_norm(x, dim=(1, 2)) for x in (torch.sub(found, L, out=L), found))
            return objective, norm
        rows, columns = _tile_of(self._W)
        scratch, squares = self._W.new_empty(rows * columns), []
        factors = ((B, A) for B in torch.split(left, rows) for A in torch.split(right, columns, dim=1))
        targets = iter(()) if out is None else _tiles(out)
        for (W, mask), (B, A) in zip(_tiles(self._W, self._mask), factors, strict=True):
            L = torch.mm(B, A, out=scratch[: W.numel()].view(W.shape))
            squares.append(complete(L, W, mask, *next(targets, ())))
        objective, norm = _roots(squares, self._W)
        return objective, norm


def _tile_of(x: Tensor) -> tuple[int, int]:
    """Rows and columns to work on at a time, at least one of each; all of them on other devices than a CPU."""
    rows, columns = (max(1, n) for n in x.shape)
    return (min(TILE[0], rows), min(TILE[1], columns)) if x.device.type == "cpu" else (rows, columns)


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tiles of some `tensors` (d_out, d_in), row by row."""
    rows, columns = _tile_of(tensors[0])
    for strips in zip(*(torch.split(x, rows) for x in tensors), strict=True):
        yield from zip(*(torch.split(x, columns, dim=1) for x in strips), strict=True)


def _roots(squares: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(squares).sum(dim=0).sqrt().to(like.dtype)
