"""The packed form of a sparse matrix: kept values plus a bitmask. The only home of the bit layout.

A (d_out, d_in) matrix S with mask M (True = kept) is stored as

- values: (n_kept,) the kept entries in row-major order, storage dtype;
- bitmask: (d_out, ceil(d_in / 8)) uint8; column j of a row is bit ``j % 8`` (least significant first) of byte
  ``j // 8``; the padding bits of the last byte of a row are 0.

At 50 % in bf16 this is 9/16 of the dense bytes. The bit order is that of ``numpy.packbits(bitorder="little")``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mendlm.errors import CheckpointError


def pack_mask(mask: Tensor) -> Tensor:
    """Bitmask (d_out, ceil(d_in / 8)) uint8 of a (d_out, d_in) bool mask, on its device."""
    d_out, d_in = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -d_in % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.reshape(d_out, -(-d_in // 8), 8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_mask(bitmask: Tensor, d_in: int) -> Tensor:
    """Bool mask (d_out, d_in) of a bitmask (d_out, ceil(d_in / 8)) uint8; the inverse of `pack_mask`."""
    # Eight bools of a byte are looked up at once, as one int64.
    bools = _bits_of_bytes(bitmask.device).view(torch.int64).reshape(256)
    mask = bools.index_select(0, bitmask.reshape(-1).int()).view(torch.bool)
    return mask.reshape(bitmask.shape[0], 8 * bitmask.shape[1])[:, :d_in]


def _bits_of_bytes(device: torch.device) -> Tensor:
    """(256, 8) bool: the bits of every byte, the least significant first."""
    everything = torch.arange(256, dtype=torch.uint8, device=device)
    return ((everything[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1).bool()


def unpack(values: Tensor, bitmask: Tensor, d_in: int) -> Tensor:
    """Dense S (d_out, d_in) in the dtype of `values`.

    Raises
    ------
    CheckpointError : the shapes disagree, a padding bit is set, or the bitmask does not mark as many entries as there
        are values.
    """
    check_packed(values, bitmask, d_in)
    return scatter(values, bitmask, d_in)


def scatter(values: Tensor, bitmask: Tensor, d_in: int) -> Tensor:
    """`unpack` of a matrix that was checked before."""
    mask = unpack_mask(bitmask, d_in)
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(mask, values)


def find_row_starts(bitmask: Tensor) -> Tensor:
    """Where each row begins in the values: (d_out + 1,) int64 on the bitmask's device; the last is n_kept."""
    if _numpy_counts(bitmask):
        rows = np.ascontiguousarray(bitmask.numpy())
        # Eight bytes at a time, where a row has whole words.
        words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 and rows.size else rows
        row_starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(np.bitwise_count(words).sum(axis=1, dtype=np.int64), out=row_starts[1:])
        return torch.from_numpy(row_starts)
    in_rows = _population(bitmask).sum(dim=1, dtype=torch.int32).long()
    return torch.nn.functional.pad(in_rows.cumsum(0), (1, 0))


def half_of(bitmask: Tensor) -> int:
    """4 if every four columns keep exactly two (2:4), else 8 if every eight keep exactly four (4:8), else 0.

    Columns beyond the last whole byte count as not kept.
    """
    counts = _population(bitmask)
    if not counts.numel() or not bool((counts == 4).all()):
        return 0
    return 4 if bool((_population(bitmask & 15) == 2).all()) else 8


def _population(bitmask: Tensor) -> Tensor:
    """How many bits of each byte are set, uint8."""
    if _numpy_counts(bitmask):
        return torch.from_numpy(np.bitwise_count(bitmask.numpy()))
    counts = _bits_of_bytes(bitmask.device).sum(dim=1, dtype=torch.uint8)
    return counts.index_select(0, bitmask.reshape(-1).int()).reshape(bitmask.shape)


def _numpy_counts(bitmask: Tensor) -> bool:
    """Whether NumPy (from 2.0) counts, four times faster than a look-up; torch.compile does not see through it."""
    return bitmask.device.type == "cpu" and hasattr(np, "bitwise_count") and not torch.compiler.is_compiling()


def check_packed(values: Tensor, bitmask: Tensor, d_in: int) -> Tensor:
    """Row starts, as `find_row_starts`, of a matrix with `d_in` columns.

    Raises
    ------
    CheckpointError : `values` and `bitmask` do not describe one.
    """
    if values.ndim != 1 or bitmask.ndim != 2 or bitmask.dtype != torch.uint8:
        raise CheckpointError(
            f"packed weight must be 1-D values and a 2-D uint8 bitmask, got values of shape {tuple(values.shape)} "
            f"and a {bitmask.dtype} bitmask of shape {tuple(bitmask.shape)}."
        )
    if bitmask.shape[1] != -(-d_in // 8):
        raise CheckpointError(f"bitmask has {bitmask.shape[1]} bytes a row, {d_in} columns need {-(-d_in // 8)}.")
    if d_in % 8 and bool((bitmask[:, -1] >> (d_in % 8)).any()):
        raise CheckpointError("a padding bit of the bitmask is set: the file is damaged.")
    row_starts = find_row_starts(bitmask)
    population = int(row_starts[-1])
    if population != values.numel():
        raise CheckpointError(f"bitmask marks {population} entries as kept but there are {values.numel()} values.")
    return row_starts
