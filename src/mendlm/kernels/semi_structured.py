"""2:4 weights for the sparse tensor cores of CUDA devices, by torch's semi-structured sparse tensors.

torch has two implementations: cuSPARSELt, and kernels of CUTLASS that are made for compute capability 8.x only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from mendlm.kernels import _cusparselt

DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


def obstacle(bitmask: Tensor, d_in: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why S cannot be multiplied as 2:4 on a device, and what to do about it; None if it can.

    Parameters
    ----------
    bitmask : (d_out, ceil(d_in / 8)) uint8 on any device, as in `mendlm.packing`. A kept zero counts as kept.
    d_in : columns of S.
    dtype : of the weights. int8 is none of the two: torch multiplies it with int8 inputs only.
    device : where the product runs.
    """
    if device.type != "cuda":
        return f"that needs a CUDA device and the layer is on {device}: load it with device='cuda'"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"that needs compute capability 8.0 and {device} has {found}: use the runtime 'merged'"
    if dtype not in DTYPES:
        return f"that needs bfloat16 or float16 and the weights are {dtype}: load them with dtype=torch.bfloat16"
    torch_class = _torch_class(device)
    if torch_class is None:
        return "this torch has no cuSPARSELt, which newer devices than 8.x need: install one, or use 'merged'"
    shape, least = (bitmask.shape[0], d_in), torch_class._DTYPE_SHAPE_CONSTRAINTS[dtype]
    rows, columns = least.sparse_min_rows, least.sparse_min_cols
    if 0 in shape or shape[0] % rows or shape[1] % columns:
        return f"torch needs multiples of {rows} x {columns} and S is {shape[0]} x {shape[1]}: use the runtime 'merged'"
    if not is_two_of_four(bitmask):
        return "some group of four columns keeps more than two entries: compress with the pattern 2:4, or use 'merged'"
    return None


def is_two_of_four(bitmask: Tensor) -> bool:
    """Whether every aligned group of four columns keeps at most two entries."""
    few = torch.tensor([n.bit_count() <= 2 for n in range(16)], device=bitmask.device)
    return bool(few[(bitmask & 15).int()].all() and few[(bitmask >> 4).int()].all())


def compress(S: Tensor) -> Tensor:
    """Dense 2:4 S (d_out, d_in) as a semi-structured tensor on its device, 9/16 of its bytes; ask `obstacle` first.

    Values are kept as they are, but the sign of a zero may be lost.
    """
    torch_class = _torch_class(S.device)
    assert torch_class is not None  # noqa: S101 (`obstacle` was asked)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
        sparse: Tensor = torch_class.from_dense(S.contiguous())
    return sparse


def multiply(x: Tensor, sparse: Tensor, bias: Tensor | None) -> Tensor:
    """(…, d_in) -> (…, d_out), contiguous: x Sᵀ + bias."""
    tokens = x.reshape(-1, x.shape[-1])
    n_tokens, d_out = tokens.shape[0], sparse.shape[0]
    if not n_tokens:
        y = x.new_empty(0, d_out)
    elif torch.compiler.is_compiling() or not _has_plans(sparse):
        y = linear(tokens, sparse, bias).contiguous()
    else:
        missing = -n_tokens % _cusparselt.TOKENS
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens.contiguous()
        compressed: Any = sparse.packed  # type: ignore[attr-defined]
        y = _cusparselt.multiply(compressed, d_out, tokens)[:n_tokens]
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], d_out)


def _has_plans(sparse: Tensor) -> bool:
    return isinstance(sparse, torch.sparse.SparseSemiStructuredTensorCUSPARSELT) and _cusparselt.available()


def _torch_class(device: torch.device) -> Any:
    """The class of `torch.sparse` that works on a device of sufficient capability, or None."""
    if torch.backends.cusparselt.is_available():
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    return torch.sparse.SparseSemiStructuredTensorCUTLASS if torch.cuda.get_device_capability(device)[0] == 8 else None
