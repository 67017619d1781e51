"""Masks: (scores, pattern) -> boolean tensor, True = kept, with exact counts.

Choosing a mask is a projection: among all masks the pattern allows, the one with the largest sum of scores.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from mendlm.linalg import compute_dtype
from mendlm.patterns import SINGLE, Pattern

# Up to this many columns (n:m), sorting whole columns against each other beats a selection in every short row.
_SMALL_GROUP = 8


def mask_from_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """Keep the `pattern.n_kept` units with the largest finite `scores` (d_out, d_in) of every group.

    Ties go to the unit that comes first in memory.
    """
    group = pattern.group_size(*scores.shape)
    if scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    units = pool(scores, pattern.unit)
    mask = keep_largest(units.reshape(-1, group), pattern.n_kept(group))
    return expand(mask.reshape(units.shape), pattern.unit)


def pool(scores: Tensor, unit: tuple[int, int]) -> Tensor:
    """Sums of `scores` (d_out, d_in) over units of (rows, columns): (d_out / rows, d_in / columns)."""
    if unit == SINGLE:
        return scores
    d_out, d_in = scores.shape
    rows, cols = unit
    tiles = scores.reshape(d_out // rows, rows, d_in // cols, cols)
    return tiles.sum(dim=(1, 3), dtype=compute_dtype(scores.dtype))


def expand(mask: Tensor, unit: tuple[int, int]) -> Tensor:
    """The mask of entries for a `mask` of units; the inverse of `pool`."""
    if unit == SINGLE:
        return mask
    rows, cols = unit
    return mask.repeat_interleave(rows, dim=0).repeat_interleave(cols, dim=1)


def keep_largest(scores: Tensor, n_keep: int) -> Tensor:
    """Mask of the `n_keep` largest entries of each row of `scores` (n_groups, group), earlier entries first."""
    size = scores.shape[1]
    if n_keep == 0 or n_keep == size:
        return torch.full_like(scores, bool(n_keep), dtype=torch.bool)
    threshold = _kth_smallest(scores, size - n_keep + 1)
    mask = scores >= threshold
    n_surplus = int(torch.count_nonzero(mask)) - n_keep * scores.shape[0]
    if n_surplus == 0:
        return mask
    # Entries tied with the threshold: only the first few of each row stay.
    tied = scores == threshold
    n_tied_kept = n_keep - (mask.sum(dim=1, keepdim=True) - tied.sum(dim=1, keepdim=True))
    return mask & ~(tied & (tied.cumsum(dim=1) > n_tied_kept))


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """k-th smallest value (from 1) of each row, (n_groups, 1)."""
    if scores.shape[1] <= _SMALL_GROUP:
        columns: list[Tensor] = list(scores.T.contiguous())
        for i, j in _sorting_network(len(columns)):
            columns[i], columns[j] = torch.minimum(columns[i], columns[j]), torch.maximum(columns[i], columns[j])
        return columns[k - 1][:, None]
    if scores.device.type != "cpu":
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # NumPy's vectorized selection: 20 times faster than torch.kthvalue here. float32 holds bf16 and fp16 exactly.
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    ordered = np.partition(wide.numpy(), k - 1, axis=1)
    return torch.from_numpy(ordered[:, k - 1 : k].copy()).to(scores.dtype)


@cache
def _sorting_network(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs (i < j) to compare and exchange that sort any `n` values: Batcher's odd-even merge sort.

    Comparisons with places beyond n would not exchange anything, as if the largest values stood there.
    """
    pairs = []
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for first in range(k % p, n - k, 2 * k):
                for i in range(first, min(first + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        pairs.append((i, i + k))
            k //= 2
        p *= 2
    return tuple(pairs)
