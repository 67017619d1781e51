"""2:4 products by cuSPARSELt with plans that are kept, through the library that torch brings.

torch makes a plan in every call, 0.7 ms or more on the CPU where the product itself takes 0.4 ms, and by default for an
algorithm slower than a dense product (LLaMA-7B's MLP, 4096 tokens, H100, cuSPARSELt 0.8: 592 µs, dense 494, the best
algorithm 348). A kept plan costs 30 µs a call. Matrices are compressed by torch; the layout is the same.
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import weakref
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

import torch
from torch import Tensor

# Of the loader: the very library that torch has loaded, whatever folder it is in, or none.
_LIBRARY = "libcusparseLt.so.0"
OLDEST = 600  # 0.6.0: the first with today's signatures that torch was built with
ALIGNMENT = 16  # bytes
TOKENS = 8  # the number of tokens must be a multiple
# From cusparseLt.h and library_types.h.
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_COLUMN, _ROW = 1, 2
_FLOAT32_SUMS = 2
_CONFIG, _N_CONFIGS = 0, 1  # attributes of an algorithm
# For what the algorithms are timed: large matrices, which alone have something to gain, and not float16, of which
# algorithm 36 (cuSPARSELt 0.8, H100) is an illegal instruction, after which nothing runs on the device.
LEAST_SIDE, LEAST_TOKENS, TIMED = 1024, 1024, torch.bfloat16
_DATA = 16384  # bytes for a structure of the library; the largest has had 11,024


def available() -> bool:
    """Whether the library is there, and one that this module knows."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except (OSError, AttributeError):  # not loaded; a system without such libraries
        return None
    return found if _version(found) >= OLDEST else None


def _version(library: ctypes.CDLL) -> int:
    """As the library counts: 802 is 0.8.2."""
    number = [c_int(), c_int(), c_int()]
    for place, found in enumerate(number):
        library.cusparseLtGetProperty(c_int(place), byref(found))
    major, minor, patch = (found.value for found in number)
    return 1000 * major + 100 * minor + patch


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), f"cusparseLt{name}")(*arguments)
    if status:
        raise RuntimeError(f"cuSPARSELt: {name} gave status {status}")


def _structure() -> c_void_p:
    """Room for one of the library's opaque structures, aligned."""
    memory = ctypes.create_string_buffer(_DATA + 64)
    pointer = c_void_p(-(-ctypes.addressof(memory) // 64) * 64)
    pointer.memory = memory  # type: ignore[attr-defined]
    return pointer


@functools.cache
def _handle(device: int) -> c_void_p:
    """Of the device, which is the current one."""
    handle = _structure()
    _call("Init", handle)
    return handle


class _Plan:
    """``y = x Sᵀ`` for one size: x (n, d_in), S (d_out, d_in) 2:4, y (n, d_out), rows one after the other.

    Made and called while its device is the current one.
    """

    def __init__(self, device: int, d_out: int, d_in: int, n: int, dtype: torch.dtype, config: int | None) -> None:
        handle, kind, align = _handle(device), _TYPES[dtype], c_uint32(ALIGNMENT)
        S, x, y, product, algorithm, plan = (_structure() for _ in range(6))
        rows, columns, tokens = c_int64(d_out), c_int64(d_in), c_int64(n)
        _call("StructuredDescriptorInit", handle, S, rows, columns, columns, align, kind, _ROW, 0)
        _call("DenseDescriptorInit", handle, x, tokens, columns, columns, align, kind, _ROW)
        _call("DenseDescriptorInit", handle, y, rows, tokens, rows, align, kind, _COLUMN)
        _call("MatmulDescriptorInit", handle, product, 0, 1, S, x, y, y, _FLOAT32_SUMS)
        _call("MatmulAlgSelectionInit", handle, algorithm, product, 0)
        if config is not None:
            _call("MatmulAlgSetAttribute", handle, algorithm, _CONFIG, byref(c_int(config)), c_size_t(4))
        found = c_int()
        _call("MatmulAlgGetAttribute", handle, algorithm, _N_CONFIGS, byref(found), c_size_t(4))
        _call("MatmulPlanInit", handle, plan, product, algorithm)
        self.n_configs = found.value
        workspace = c_size_t()
        _call("MatmulGetWorkspace", handle, plan, byref(workspace))
        self._workspace = workspace.value
        self._handle, self._plan, self._parts = handle, plan, (S, x, y, product, algorithm)
        self._one, self._zero = c_float(1), c_float(0)
        weakref.finalize(self, _destroy, plan, S, x, y).atexit = False

    def __call__(self, compressed: Tensor, x: Tensor, y: Tensor) -> None:
        """On the current stream; memory between is of torch, so that calls on several streams do not meet."""
        workspace = x.new_empty(self._workspace, dtype=torch.uint8)
        stream, result = c_void_p(torch.cuda.current_stream(x.device).cuda_stream), c_void_p(y.data_ptr())
        _call(
            "Matmul",
            self._handle,
            self._plan,
            byref(self._one),
            c_void_p(compressed.data_ptr()),
            c_void_p(x.data_ptr()),
            byref(self._zero),
            result,
            result,
            c_void_p(workspace.data_ptr()),
            byref(stream),
            1,
        )


def _destroy(plan: c_void_p, *descriptors: c_void_p) -> None:
    _call("MatmulPlanDestroy", plan)
    for descriptor in descriptors:
        _call("MatDescriptorDestroy", descriptor)


_plan = functools.lru_cache(maxsize=256)(_Plan)
_fastest: dict[tuple[int, int, int, torch.dtype], int | None] = {}  # by device and size of S: the algorithm


def multiply(compressed: Tensor, d_out: int, x: Tensor) -> Tensor:
    """(n, d_in) -> (n, d_out): x Sᵀ, with sums in float32, rounded once. No gradients.

    Parameters
    ----------
    compressed : S (d_out, d_in) as `torch._cslt_compress` gives it, d_out and d_in multiples of 16.
    x : bfloat16 or float16, contiguous, on the device of S; n is a multiple of `TOKENS`.

    Raises
    ------
    RuntimeError : the library refuses.

    Notes
    -----
    The first call for a large S in bfloat16 with many tokens tries every algorithm that the library has (some 0.2 s),
    and all later ones for that size take the fastest; not while a CUDA graph is being captured.
    """
    n, d_in = x.shape
    device = x.device.index
    y = x.new_empty(n, d_out)
    key = device, d_out, d_in, x.dtype
    large = min(d_out, d_in) >= LEAST_SIDE and n >= LEAST_TOKENS and x.dtype == TIMED
    with torch.cuda.device(device):
        if large and key not in _fastest and not torch.cuda.is_current_stream_capturing():
            _fastest[key] = _search(compressed, x, y)
        _plan(device, d_out, d_in, n, x.dtype, _fastest.get(key))(compressed, x, y)
    return y


def _search(compressed: Tensor, x: Tensor, y: Tensor) -> int | None:
    """The fastest algorithm that gives what the default one gives; None: that one."""
    (n, d_in), d_out = x.shape, y.shape[1]
    size = x.device.index, d_out, d_in, n, x.dtype
    default = _plan(*size, None)
    default(compressed, x, y)
    expected = y.clone()
    norm = torch.linalg.vector_norm(expected, dtype=torch.float32)
    times: dict[int | None, float] = {None: _seconds(default, compressed, x, y)}
    for config in range(default.n_configs):
        try:
            plan = _Plan(*size, config)
            plan(compressed, x, y.zero_())
        except RuntimeError:  # not for this size
            continue
        error = torch.linalg.vector_norm(y - expected, dtype=torch.float32)
        if bool(error <= torch.finfo(x.dtype).eps * norm):
            times[config] = _seconds(plan, compressed, x, y)
    best = sorted(times, key=lambda config: times[config])[:4]
    plans = {config: _plan(*size, config) for config in best}
    for _ in range(8):  # a device that has been at it for long is slower, and not by as much for all
        times = {config: _seconds(plan, compressed, x, y) for config, plan in plans.items()}
    return min(times, key=lambda config: times[config])


def _seconds(plan: _Plan, compressed: Tensor, x: Tensor, y: Tensor) -> float:
    times: list[float] = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        plan(compressed, x, y)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
