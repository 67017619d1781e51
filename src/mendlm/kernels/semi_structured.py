"""2:4 weights for the sparse tensor cores of CUDA devices, by torch's semi-structured sparse tensors.

torch has two implementations: cuSPARSELt, and kernels of CUTLASS that are made for compute capability 8.x only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mendlm.kernels import _cusparselt, packed

DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
_PLANNED = torch.sparse.SparseSemiStructuredTensorCUSPARSELT  # of which `_cusparselt` multiplies


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


def compress(S: Tensor, lora_B: Tensor) -> Tensor:
    """Dense 2:4 S (d_out, d_in) as a semi-structured tensor on its device, 9/16 of its bytes; ask `obstacle` first.

    Values are kept as they are, but the sign of a zero may be lost.

    Notes
    -----
    Where that makes `multiply` faster, B (d_out, rank) is in it too, as some 2 · rank more columns: two of its columns
    and two zeros by turns are 2:4. `split` gives both back.
    """
    torch_class = _torch_class(S.device)
    assert torch_class is not None  # noqa: S101 (`obstacle` was asked)
    if takes_B(S, lora_B):
        unit = torch_class._DTYPE_SHAPE_CONSTRAINTS[S.dtype].sparse_min_cols
        S = torch.cat([S, _in_pairs(lora_B.detach().to(S.dtype), -(-2 * lora_B.shape[1] // unit) * unit)], dim=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage.*")
        sparse: Tensor = torch_class.from_dense(S.contiguous())
    return sparse


def takes_B(S: Tensor, lora_B: Tensor) -> bool:
    """Whether `compress` takes B in: it spares a pass over y (n, d_out) for one over x (n, d_in)."""
    d_out, d_in = S.shape
    return _cusparselt.available() and lora_B.shape[1] > 0 and d_in <= d_out and _torch_class(S.device) is _PLANNED


def split(sparse: Tensor, d_in: int, rank: int) -> tuple[Tensor, Tensor | None]:
    """S (d_out, d_in) and B (d_out, rank) of what `compress` gave; None if B is not in it."""
    dense, d_out = sparse.to_dense(), sparse.shape[0]
    S, beside = dense[:, :d_in].contiguous(), dense[:, d_in:]
    if not beside.shape[1]:
        return S, None
    return S, beside.reshape(d_out, -1, 4)[:, :, :2].reshape(d_out, -1)[:, :rank].contiguous()


def multiply(x: Tensor, sparse: Tensor, lora_A: Tensor, bias: Tensor | None) -> Tensor:
    """(…, d_in) -> (…, d_out), contiguous: x Sᵀ + bias, and (x Aᵀ) Bᵀ if B is in `sparse`. No gradients."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(sparse.dtype)
    tokens = x.reshape(-1, x.shape[-1])
    n_tokens, d_out = tokens.shape[0], sparse.shape[0]
    if not n_tokens:
        return x.new_empty(*x.shape[:-1], d_out)
    planned = not torch.compiler.is_compiling() and x.dtype == sparse.dtype and _has_plans(sparse)
    # Plans are for whole groups of tokens; torch pads by itself.
    n_rows = n_tokens + (-n_tokens % _cusparselt.TOKENS if planned else 0)
    if sparse.shape[1] > x.shape[-1]:
        tokens = _beside(tokens, linear(tokens, lora_A), n_rows, sparse.shape[1])
    elif n_rows > n_tokens:
        tokens = pad(tokens, (0, 0, 0, n_rows - n_tokens))
    if planned:
        compressed: Any = sparse.packed  # type: ignore[attr-defined]
        y = _cusparselt.multiply(compressed, d_out, tokens.contiguous())[:n_tokens]
        if bias is not None:
            y += bias
    else:
        y = linear(tokens, sparse, bias).contiguous()
    return y.reshape(*x.shape[:-1], d_out)


def _beside(x: Tensor, h: Tensor, n_rows: int, width: int) -> Tensor:
    """(n_rows, width): x (n, d_in), and beside it h (n, rank) in the places that B has in S; zeros elsewhere."""
    if x.is_cuda and not torch.compiler.is_compiling() and packed.available("cuda"):
        from mendlm.kernels import _triton

        return _triton.beside(x, h, n_rows, width)
    wide = torch.cat([x, _in_pairs(h, width - x.shape[1])], dim=1)
    return pad(wide, (0, 0, 0, n_rows - x.shape[0]))


def _in_pairs(B: Tensor, width: int) -> Tensor:
    """(n, rank) -> (n, width): two columns and two of zeros by turns."""
    B = pad(B, (0, width // 2 - B.shape[1]))
    return pad(B.reshape(-1, width // 4, 2), (0, 2)).reshape(-1, width)


def _has_plans(sparse: Tensor) -> bool:
    return isinstance(sparse, _PLANNED) and _cusparselt.available()


def _torch_class(device: torch.device) -> Any:
    """The class of `torch.sparse` that works on a device of sufficient capability, or None."""
    if torch.backends.cusparselt.is_available():
        return _PLANNED
    return torch.sparse.SparseSemiStructuredTensorCUTLASS if torch.cuda.get_device_capability(device)[0] == 8 else None
