"""Operator `mendlm::packed_linear`: y = x (S + B A)ᵀ + bias with S read in its packed form.

Each device has its implementation: a C library on the CPU, Triton on CUDA. Without one, callers unpack S with torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The most tokens for which a device's kernel beats unpacking S and multiplying; no entry: no kernel.
MAX_TOKENS = {"cuda": 0}


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether `packed_linear` takes these, and is the faster way for as many tokens as `x` (…, d_in) has."""
    tokens = x.numel() // max(x.shape[-1], 1)
    return x.dtype == values.dtype and tokens <= MAX_TOKENS.get(x.device.type, 0)


@torch.library.custom_op("mendlm::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """(…, d_in) -> (…, d_out), contiguous, in the dtype of `x`; sums in float32, rounded once. No gradients.

    Parameters
    ----------
    x : (…, d_in) input; its dtype is that of values, factors and bias.
    values, bitmask : S as in `mendlm.packing`: (n_kept,), and (d_out, ceil(d_in / 8)) uint8.
    row_starts : (d_out + 1,) int64, where each row begins in `values`; the last is n_kept.
    lora_A, lora_B : (rank, d_in), (d_out, rank).
    bias : (d_out,) or None.
    """
    raise NotImplementedError


@packed_linear.register_kernel("cuda")
def _cuda(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
) -> Tensor:
    from mendlm.kernels import _triton

    return _triton.packed_linear(x, values, bitmask, row_starts, lora_A, lora_B, bias)


@packed_linear.register_fake
def _fake(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], lora_B.shape[0])
