"""The C kernel of `packed.c` through ctypes; built when mendlm is installed (`hatch_build.py`)."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from mendlm.errors import CheckpointError, MendError

LIBRARY = Path(__file__).with_name("_packed.so")
ABI = 4
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ISAS = ("generic", "avx2", "avx512")

_DONE, _OUT_OF_MEMORY, _INCONSISTENT = 0, 1, 2


@functools.cache
def _library() -> ctypes.CDLL:
    # OSError: there is none, or it is of another platform.
    library = ctypes.CDLL(str(LIBRARY))
    if library.mendlm_abi() != ABI:
        raise OSError(f"{LIBRARY.name} was built from another version of packed.c")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.mendlm_packed_linear.argtypes = [*[pointer] * 8, *[size] * 5, *[number] * 3]
    library.mendlm_unpack.argtypes = [*[pointer] * 4, *[size] * 3, *[number] * 3]
    library.mendlm_complete.argtypes = [*[pointer] * 6, *[size] * 6, *[number] * 2]
    return library


def unavailable() -> str | None:
    """Why the kernel cannot be used, or None if it can."""
    if os.environ.get("MENDLM_KERNEL") == "0":
        return "MENDLM_KERNEL=0 turns it off"
    try:
        _library()
    except (OSError, AttributeError) as err:
        return f"the C kernel is not installed ({err}); install mendlm again where there is a C compiler"
    return None


def has_threads() -> bool:
    """Whether the kernel found torch's thread pool; without it, it runs in one thread."""
    return bool(_library().mendlm_has_threads())


def isas() -> tuple[str, ...]:
    """Instruction sets that this CPU has a version for, the best last."""
    return ISAS[: _library().mendlm_isa() + 1]


def packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    isa: str | None = None,
) -> Tensor:
    """`mendlm.kernels.packed.packed_linear`; `isa` is one of `isas()`, the best if not given."""
    d_out, rank = lora_B.shape
    d_in = lora_A.shape[1]
    tokens = x.shape[:-1].numel()
    x, values, bitmask, row_starts = x.contiguous(), values.contiguous(), bitmask.contiguous(), row_starts.contiguous()
    lora_A, lora_B, bias = lora_A.contiguous(), lora_B.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(*x.shape[:-1], d_out)
    _check(
        _library().mendlm_packed_linear(
            y.data_ptr(),
            x.data_ptr(),
            values.data_ptr(),
            bitmask.data_ptr(),
            row_starts.data_ptr(),
            lora_A.data_ptr(),
            lora_B.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            d_out,
            d_in,
            rank,
            values.numel(),
            DTYPES[x.dtype],
            _isa(isa),
            torch.get_num_threads(),
        )
    )
    return y


def unpack(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, isa: str | None = None) -> Tensor:
    """`mendlm.kernels.packed.unpack`; `isa` as above."""
    d_out = bitmask.shape[0]
    values, bitmask, row_starts = values.contiguous(), bitmask.contiguous(), row_starts.contiguous()
    S = values.new_empty(d_out, d_in)
    _check(
        _library().mendlm_unpack(
            S.data_ptr(),
            values.data_ptr(),
            bitmask.data_ptr(),
            row_starts.data_ptr(),
            d_out,
            d_in,
            values.numel(),
            DTYPES[values.dtype],
            _isa(isa),
            torch.get_num_threads(),
        )
    )
    return S


def complete(L: Tensor, W: Tensor, mask: Tensor, out: Tensor | None, isa: str | None = None) -> tuple[float, float]:
    """L on the `mask` and W elsewhere, into `out` if there is one: sums of (that - L)² and of its own squares.

    Parameters
    ----------
    L, W, mask, out : of one shape (rows, columns), float32 and bool, on the CPU, every row contiguous.

    Notes
    -----
    Sums are in float32 along a row and in float64 beyond, in an order that no number of threads changes.
    """
    left, square = ctypes.c_double(), ctypes.c_double()
    _check(
        _library().mendlm_complete(
            ctypes.byref(left),
            ctypes.byref(square),
            None if out is None else out.data_ptr(),
            L.data_ptr(),
            W.data_ptr(),
            mask.data_ptr(),
            *L.shape,
            0 if out is None else out.stride(0),
            L.stride(0),
            W.stride(0),
            mask.stride(0),
            _isa(isa),
            torch.get_num_threads(),
        )
    )
    return left.value, square.value


def _isa(name: str | None) -> int:
    best: int = _library().mendlm_isa()
    return best if name is None else ISAS.index(name)


def _check(status: int) -> None:
    if status == _INCONSISTENT:
        raise CheckpointError("bitmask and row starts disagree: the bitmask was changed, or the file is damaged.")
    if status == _OUT_OF_MEMORY:
        raise MemoryError("no memory for the input in float32.")
    if status != _DONE:
        raise MendError("this CPU lacks the instruction set asked for.")
