"""Masks: (scores, pattern) -> boolean tensor, True = kept, with exact counts.

Choosing a mask is a projection: among all masks the pattern allows, the one with the largest sum of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mendlm.linalg import compute_dtype
from mendlm.patterns import SINGLE, Pattern

# Up to this many columns (n:m), sorting whole columns against each other beats a selection in every short row.
_SMALL_GROUP = 8
# From this many entries a group is searched in pieces: a copy of it would be what a whole run takes most memory for.
_LARGE_GROUP = 1 << 20
_SAMPLES = 1 << 16
_PIECE = 1 << 17  # entries that the cache holds

# Whole matrices are passed over so many bytes at a time on a CPU, where no more than that is to be copied at once.
BLOCK_BYTES = 8 * 2**20


def row_blocks(*tensors: Tensor, n_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of some `tensors` with as many rows, a block at a time.

    A block is `n_bytes` of the first tensor on a CPU, at least one row; all of it elsewhere.
    """
    x = tensors[0]
    rows = n_bytes // max(1, x.shape[1] * x.itemsize) if x.device.type == "cpu" else x.shape[0]
    return zip(*(torch.split(x, max(1, rows)) for x in tensors), strict=True)


def zero_(x: Tensor, mask: Tensor, *, off: bool) -> Tensor:
    """Set `x` (d_out, d_in) to zero off the bool `mask` (or on it), in place and without a copy of either.

    By a product with 0 and 1, far faster on a CPU than `torch.where` with a bool mask: a zero may be -0, and NaN stays.
    """
    for part, kept in row_blocks(x, mask):
        part.mul_((kept if off else ~kept).to(x.dtype))
    return x


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


def mask_of_largest(x: Tensor, pattern: Pattern) -> Tensor:
    """The mask of the matrix of the `pattern` nearest to `x` (d_out, d_in): entries by size, tiles by their norm."""
    size = x.abs()
    if pattern.unit != SINGLE and size.numel():
        # Relative to the largest one, whose square neither overflows nor underflows.
        size = size.div_(size.amax().clamp_min(torch.finfo(size.dtype).tiny)).square_()
    return mask_from_scores(size, pattern)


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
    masks = [_keep_largest(block, n_keep) for (block,) in row_blocks(scores)]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def _keep_largest(scores: Tensor, n_keep: int) -> Tensor:
    size = scores.shape[1]
    if n_keep == 0 or n_keep == size:
        return torch.full_like(scores, bool(n_keep), dtype=torch.bool)
    threshold = _kth_smallest(scores, size - n_keep + 1)
    mask = scores >= threshold
    n_surplus = int(torch.count_nonzero(mask)) - n_keep * scores.shape[0]
    if n_surplus == 0:
        return mask
    if size >= _LARGE_GROUP:
        for row in range(scores.shape[0]):
            _drop_surplus(mask[row], scores[row], threshold[row], int(torch.count_nonzero(mask[row])) - n_keep)
        return mask
    # Entries tied with the threshold: only the first few of each row stay.
    tied = scores == threshold
    n_tied_kept = n_keep - (mask.sum(dim=1, keepdim=True) - tied.sum(dim=1, keepdim=True))
    return mask & ~(tied & (tied.cumsum(dim=1) > n_tied_kept))


def _drop_surplus(mask: Tensor, scores: Tensor, threshold: Tensor, n_surplus: int) -> None:
    """Take the last `n_surplus` entries that equal `threshold` out of `mask` (group,), in place."""
    pieces = zip(torch.split(mask, _LARGE_GROUP), torch.split(scores, _LARGE_GROUP), strict=True)
    for kept, piece in reversed(list(pieces)):
        if n_surplus == 0:
            return
        last = (piece == threshold).nonzero()[:, 0][-n_surplus:]
        kept[last] = False
        n_surplus -= last.numel()


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """k-th smallest value (from 1) of each row, (n_groups, 1)."""
    if scores.shape[1] <= _SMALL_GROUP:
        columns: list[Tensor] = list(_transposed(scores))
        for i, j in _sorting_network(len(columns)):
            columns[i], columns[j] = torch.minimum(columns[i], columns[j]), torch.maximum(columns[i], columns[j])
        return columns[k - 1][:, None]
    if scores.device.type != "cpu":
        if scores.shape[1] >= _LARGE_GROUP:  # kthvalue gives a row to one multiprocessor: 258 ms for 4096 x 4096
            return scores.sort(dim=1).values[:, k - 1 : k]
        return scores.kthvalue(k, dim=1, keepdim=True).values
    # NumPy's vectorized selection: 20 times faster than torch.kthvalue here. float32 holds bf16 and fp16 exactly.
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    if scores.shape[1] >= _LARGE_GROUP:
        found = np.stack([_kth_of_large(row, k) for row in wide.numpy()])[:, None]
    else:
        found = np.partition(wide.numpy(), k - 1, axis=1)[:, k - 1 : k].copy()
    return torch.from_numpy(found).to(scores.dtype)


def _transposed(scores: Tensor) -> Tensor:
    """``scores.T`` in memory of its own; few columns take NumPy a fifth of torch's time."""
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.T.contiguous()
    return torch.from_numpy(np.ascontiguousarray(scores.numpy().T))


def _kth_of_large(values: NDArray[np.floating], k: int) -> np.floating:
    """k-th smallest (from 1) of finite `values` (group,), of which only those near it are copied.

    Quantiles of a sample enclose it; where they do not, all are copied.
    """
    sample = np.sort(values[:: (values.size // _SAMPLES) | 1])  # an odd stride meets the columns of a matrix by turns
    place, spread = k * sample.size // values.size, 4 * int(sample.size**0.5)
    lower, upper = sample[max(place - spread, 0)], sample[min(place + spread, sample.size - 1)]
    n_below, found_near = 0, []
    for start in range(0, values.size, _PIECE):
        piece = values[start : start + _PIECE]
        n_below += int(np.count_nonzero(piece < lower))
        found_near.append(piece[(piece >= lower) & (piece <= upper)])
    near = np.concatenate(found_near)
    if not n_below < k <= n_below + near.size:
        near, n_below = values, 0
    found: np.floating = np.partition(near, k - 1 - n_below)[k - 1 - n_below]
    return found


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
