"""Products, and attention, of bfloat16 and float16 matrices on a CPU that has no instructions for them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.matmul,
    torch.mm,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.matmul,
    Tensor.mm,
}
_HALF = (torch.bfloat16, torch.float16)


def quick_products(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """A context in which products of matrices of `dtype` are not slower than those in float32.

    Parameters
    ----------
    device, dtype : of the matrices.

    Returns
    -------
    `FloatProducts` for half precision on a CPU without instructions for it, where torch multiplies element by element
    (bfloat16: a seventh to a ninth of the speed of float32; gradients of attention: a sixth); a context that does
    nothing elsewhere.
    """
    if device.type != "cpu" or dtype not in _HALF or _has_instructions(dtype):
        return contextlib.nullcontext()
    return FloatProducts()


class FloatProducts(TorchFunctionMode):
    """Multiplies matrices of half precision in float32, and rounds the product to their dtype.

    As the hardware that has such instructions does: entries are exact in float32, sums are in float32, and only the
    result is rounded. Gradients pass through. Attention is one product: what it multiplies is not rounded in between.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or "out" in kwargs:
            return func(*args, **kwargs)
        dtypes = {a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor)} - {torch.bool}
        if len(dtypes) != 1 or not dtypes <= set(_HALF):
            return func(*args, **kwargs)
        wide = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        return wide.to(dtypes.pop())


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype != torch.bool else value


def _has_instructions(dtype: torch.dtype) -> bool:
    """What torch's library of products says; True, torch's own way, where this build does not tell."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or bool(supported())
