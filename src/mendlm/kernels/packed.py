"""Operators on packed weights: `packed_linear`, which never unpacks S, and `unpack`.

`mendlm::packed_linear` has one implementation for each kind of device: C on the CPU (`_cpu`), Triton on CUDA
(`_triton`). Where a device has none, callers unpack S and multiply, which is what the operator does there too.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from mendlm.errors import UsageError
from mendlm.kernels import _cpu
from mendlm.packing import scatter

# The most tokens for which a device's kernel beats unpacking S and multiplying (docs/runtimes.md); no entry: no kernel.
# That of CUDA is what one reading of S serves.
MAX_TOKENS = {"cpu": 32, "cuda": 16}
HAS_TRITON = find_spec("triton") is not None


def unavailable(device: str = "cpu") -> str | None:
    """Why there is no kernel for a kind of device, or None if there is one. `MENDLM_KERNEL=0` turns the CPU's off."""
    if device == "cpu":
        return _cpu.unavailable()
    if device != "cuda":
        return f"there is no kernel for {device!r}"
    return None if HAS_TRITON else "Triton is not installed"


def available(device: str = "cpu") -> bool:
    """Whether there is a kernel for a kind of device."""
    return unavailable(device) is None


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether `packed_linear` takes these, and is the faster way for as many tokens as `x` (…, d_in) has."""
    device = x.device.type
    return (
        x.shape[:-1].numel() <= MAX_TOKENS.get(device, 0)
        and x.dtype == values.dtype
        and x.dtype in _cpu.DTYPES
        and not torch.is_autocast_enabled(device)
        and _has_kernel(device)
    )


def _has_kernel(device: str) -> bool:
    # A compiler cannot look into the search for a library, and need not: the operators fall back by themselves.
    return torch.compiler.is_compiling() or available(device)


def unpacks(values: Tensor) -> bool:
    """Whether `unpack` has more to offer for these values than torch."""
    device = values.device.type
    return device in MAX_TOKENS and values.dtype in _cpu.DTYPES and _has_kernel(device)


def add_low_rank(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, *, in_place: bool) -> Tensor:
    """``y + (x Aᵀ) Bᵀ``: (…, d_out) of x (…, d_in), A (rank, d_in) and B (d_out, rank).

    Parameters
    ----------
    in_place : whether `y` may be overwritten; only where nothing needs a gradient. Many tokens on CUDA are then added
        without a second pass over (…, d_out).
    """
    h = linear(x, lora_A)
    n_tokens = y.shape[:-1].numel()
    if (
        in_place
        and y.is_cuda
        and n_tokens > MAX_TOKENS["cuda"]
        and y.dtype == h.dtype == lora_B.dtype
        and y.dtype in (torch.bfloat16, torch.float16)
        and y.is_contiguous()
        and not torch.compiler.is_compiling()
        and _has_kernel("cuda")
    ):
        from mendlm.kernels import _triton

        return _triton.add_product(y.view(n_tokens, -1), h.reshape(n_tokens, -1), lora_B).view(y.shape)
    return y + linear(h, lora_B)


def packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    half_of: int = 0,
) -> Tensor:
    """(…, d_in) -> (…, d_out), contiguous, in the dtype of `x`; sums in float32, rounded once. No gradients.

    Parameters
    ----------
    x : (…, d_in) input; its dtype is that of values, factors and bias: bfloat16, float16 or float32.
    values, bitmask : S as in `mendlm.packing`: (n_kept,), and (d_out, ceil(d_in / 8)) uint8.
    row_starts : (d_out + 1,) int64, where each row begins in `values`; the last is n_kept.
    lora_A, lora_B : (rank, d_in), (d_out, rank).
    bias : (d_out,) or None.
    half_of : as `mendlm.packing.half_of` says; 0 is always right, the others are faster on CUDA.

    Raises
    ------
    UsageError : shapes or dtypes do not fit each other.
    CheckpointError : the bitmask does not mark as many entries in each row as `row_starts` says.
    """
    y: Tensor = torch.ops.mendlm.packed_linear.default(x, values, bitmask, row_starts, lora_A, lora_B, bias, half_of)
    return y


def unpack(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int = 0) -> Tensor:
    """Dense S (d_out, d_in) in the dtype of `values`; arguments and errors as for `packed_linear`."""
    S: Tensor = torch.ops.mendlm.unpack.default(values, bitmask, row_starts, d_in, half_of)
    return S


class _Operands(NamedTuple):
    """What `packed_linear` takes, in the order of the operator."""

    x: Tensor
    values: Tensor
    bitmask: Tensor
    row_starts: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    half_of: int = 0

    def check(self) -> None:
        """Nothing may be read outside a tensor, whoever calls the operator."""
        x, values, bitmask, row_starts, A, B, bias, half_of = self
        d_in, d_out = x.shape[-1], bitmask.shape[0]
        _check_layout(values, bitmask, row_starts, d_in, half_of)
        fits = A.ndim == B.ndim == 2 and A.shape == (B.shape[1], d_in) and B.shape[0] == d_out
        if not fits or (bias is not None and bias.shape != (d_out,)):
            raise UsageError(
                f"S of shape {(d_out, d_in)} has factors A {tuple(A.shape)}, B {tuple(B.shape)} and bias "
                f"{None if bias is None else tuple(bias.shape)}; A must be (rank, d_in), B (d_out, rank), "
                "bias (d_out,)."
            )
        if not x.dtype == values.dtype == A.dtype == B.dtype == (x.dtype if bias is None else bias.dtype):
            raise UsageError("input, values, factors and bias must have one dtype.")


def _packed_linear_on_cpu(*tensors: Any) -> Tensor:
    operands = _Operands(*tensors)
    operands.check()
    x, values, bitmask, _, A, B, bias, _ = operands
    if x.dtype in _cpu.DTYPES and _cpu.unavailable() is None:
        return _cpu.packed_linear(*operands[:-1])
    S = scatter(values, bitmask, x.shape[-1])
    return linear(x, S, bias) + linear(linear(x, A), B)


def _packed_linear_on_cuda(*tensors: Any) -> Tensor:
    from mendlm.kernels import _triton

    operands = _Operands(*tensors)
    operands.check()
    return _triton.packed_linear(*operands)


def _packed_linear_shape(*tensors: Any) -> Tensor:
    operands = _Operands(*tensors)
    return operands.x.new_empty(*operands.x.shape[:-1], operands.B.shape[0])


def _unpack_on_cpu(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int = 0) -> Tensor:
    _check_layout(values, bitmask, row_starts, d_in, half_of)
    if unpacks(values):
        return _cpu.unpack(values, bitmask, row_starts, d_in)
    return scatter(values, bitmask, d_in)


def _unpack_on_cuda(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int = 0) -> Tensor:
    from mendlm.kernels import _triton

    _check_layout(values, bitmask, row_starts, d_in, half_of)
    return _triton.unpack(values, bitmask, row_starts, d_in, half_of)


def _unpack_shape(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int = 0) -> Tensor:
    return values.new_empty(bitmask.shape[0], d_in)


# `torch.library.custom_op` would do, at three times the cost of a call: 11 against 3.5 µs.
_operators: Any = torch.library.Library("mendlm", "DEF")  # type: ignore[no-untyped-call]
_operators.define(
    "packed_linear(Tensor x, Tensor values, Tensor bitmask, Tensor row_starts, Tensor lora_A, Tensor lora_B, "
    "Tensor? bias, int half_of=0) -> Tensor"
)
_operators.define("unpack(Tensor values, Tensor bitmask, Tensor row_starts, int d_in, int half_of=0) -> Tensor")
_operators.impl("packed_linear", _packed_linear_on_cpu, "CPU")
_operators.impl("packed_linear", _packed_linear_on_cuda, "CUDA")
_operators.impl("unpack", _unpack_on_cpu, "CPU")
_operators.impl("unpack", _unpack_on_cuda, "CUDA")
torch.library.register_fake("mendlm::packed_linear", _packed_linear_shape, lib=_operators)
torch.library.register_fake("mendlm::unpack", _unpack_shape, lib=_operators)


def _check_layout(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int) -> None:
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != -(-d_in // 8):
        raise UsageError(f"the bitmask must be uint8 with {-(-d_in // 8)} bytes a row for {d_in} columns.")
    if row_starts.dtype != torch.int64 or row_starts.shape != (bitmask.shape[0] + 1,) or values.ndim != 1:
        raise UsageError("row starts must be int64, one more than rows, and values one-dimensional.")
    if half_of and (half_of not in (4, 8) or values.numel() != 4 * bitmask.numel() or d_in % 8):
        raise UsageError(f"of {bitmask.numel()} bytes of 8 columns {values.numel()} values are not the half.")
