"""`packed_linear` on CUDA: the bitmask is unpacked, multiplied and mended in one Triton kernel, for few tokens.

Import this module only where Triton is installed and wanted. `TRITON_INTERPRET=1`, set before Triton is imported, runs
the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_starts: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`mendlm.kernels.packed.packed_linear`, which checks the shapes.

    Raises
    ------
    TypeError : another dtype.

    Notes
    -----
    Any number of tokens is right; S is read once for every 16 of them. Block sizes are tuned at the first call for a
    shape, so the order of sums, and with it the last bits, may differ from one process to the next.
    """
    if values.dtype not in DTYPES or x.dtype != values.dtype:
        raise TypeError(f"packed_linear on CUDA takes one dtype of {DTYPES}, got x {x.dtype}, values {values.dtype}")
    d_in, (d_out, rank) = x.shape[-1], lora_B.shape
    tokens = x.reshape(-1, d_in).contiguous()
    n_tokens = tokens.shape[0]
    y = x.new_empty(n_tokens, d_out)
    if y.numel() == 0:
        return y.reshape(*x.shape[:-1], d_out)
    h = torch.empty(n_tokens, rank, dtype=torch.float32, device=x.device)
    block = 1 if n_tokens == 1 else 16
    n_blocks = triton.cdiv(n_tokens, block)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if rank:
            _project[(rank, n_blocks)](
                tokens, lora_A.contiguous(), h, n_tokens, d_in, rank, block, 256, enable_fp_fusion=True
            )
        kernel = _multiply_one if block == 1 else _multiply_some
        kernel[lambda chosen: (triton.cdiv(d_out, chosen["ROWS"]), n_blocks)](
            tokens,
            values.contiguous(),
            bitmask.contiguous(),
            row_starts.contiguous(),
            h,
            lora_B.contiguous(),
            y if bias is None else bias.contiguous(),
            y,
            n_tokens,
            d_in,
            d_out,
            bitmask.shape[1],
            rank,
            HAS_BIAS=bias is not None,
            TOKENS=block,
            WIDEN=_INTERPRETED,  # the interpreter multiplies the bits of bfloat16 as integers
            enable_fp_fusion=True,
        )
    return y.reshape(*x.shape[:-1], d_out)


def project(
    x: tl.tensor,
    lora_A: tl.tensor,
    h: tl.tensor,
    n_tokens: tl.tensor,
    d_in: tl.constexpr,
    rank: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One row of A with a block of tokens: a column of h (n_tokens, rank) float32."""
    row = tl.program_id(0)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, d_in, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < d_in
        a = tl.load(lora_A + row.to(tl.int64) * d_in + columns, mask=inside, other=0.0).to(tl.float32)
        wanted = (tokens < n_tokens)[:, None] & inside[None, :]
        sums += a[None, :] * tl.load(x + tokens[:, None] * d_in + columns[None, :], mask=wanted, other=0.0)
    tl.store(h + tokens * rank + row, tl.sum(sums, axis=1), mask=tokens < n_tokens)


def multiply(
    x: tl.tensor,
    values: tl.tensor,
    bitmask: tl.tensor,
    row_starts: tl.tensor,
    h: tl.tensor,
    lora_B: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    n_tokens: tl.tensor,
    d_in: tl.tensor,
    d_out: tl.tensor,
    n_bytes: tl.constexpr,
    rank: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """A block of rows with a block of tokens, 8 x BYTES columns after the other.

    The kept values of a row lie one after the other, so the place of each is the number of bits set before its own.
    The eight counts within a byte come from one product: its bits, spread to the nibbles of a word, times 0x11111111.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_row, is_token = rows < d_out, tokens < n_tokens
    row_values = values + tl.load(row_starts + rows, mask=is_row, other=0)
    n_before = tl.zeros((ROWS,), tl.int32)
    bit = tl.arange(0, 8)
    nibble = (4 * bit).to(tl.uint32)[None, None, :]
    if TOKENS == 1:  # every thread keeps its own sums to the end
        sums = tl.zeros((ROWS, BYTES, 8), tl.float32)
    else:
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, n_bytes, BYTES):
        places = start + tl.arange(0, BYTES)
        wanted = is_row[:, None] & (places < n_bytes)[None, :]
        byte = tl.load(bitmask + rows[:, None] * n_bytes + places[None, :], mask=wanted, other=0).to(tl.uint32)
        spread = (byte | (byte << 12)) & 0x000F000F
        spread = (spread | (spread << 6)) & 0x03030303
        spread = (spread | (spread << 3)) & 0x11111111
        counts = spread * 0x11111111
        in_byte = (counts >> 28).to(tl.int32)
        before_byte = n_before[:, None] + tl.cumsum(in_byte, axis=1) - in_byte
        n_before += tl.sum(in_byte, axis=1)
        is_kept = ((spread[:, :, None] >> nibble) & 1) != 0
        within = ((counts[:, :, None] >> nibble) & 15).to(tl.int32) - 1
        S = tl.load(row_values[:, None, None] + (before_byte[:, :, None] + within), mask=is_kept, other=0.0)
        if TOKENS == 1:
            columns = 8 * places[:, None] + bit[None, :]
            X = tl.load(x + tl.program_id(1) * d_in + columns, mask=columns < d_in, other=0.0)
            sums += S.to(tl.float32) * X.to(tl.float32)[None, :, :]
        else:
            columns = 8 * start + tl.arange(0, 8 * BYTES)
            wanted = is_token[:, None] & (columns < d_in)[None, :]
            X = tl.load(x + tokens[:, None] * d_in + columns[None, :], mask=wanted, other=0.0)
            S = tl.reshape(S, (ROWS, 8 * BYTES))
            if WIDEN:
                S, X = S.to(tl.float32), X.to(tl.float32)
            sums = tl.dot(S, tl.trans(X), sums, input_precision="ieee")
    if TOKENS == 1:
        out = tl.sum(tl.sum(sums, axis=2), axis=1)[:, None]
    else:
        out = sums
    for start in range(0, rank, 16):
        ranks = start + tl.arange(0, 16)
        wanted = is_row[:, None] & (ranks < rank)[None, :]
        B = tl.load(lora_B + rows[:, None] * rank + ranks[None, :], mask=wanted, other=0.0).to(tl.float32)
        wanted = is_token[:, None] & (ranks < rank)[None, :]
        H = tl.load(h + tokens[:, None] * rank + ranks[None, :], mask=wanted, other=0.0)
        if TOKENS == 1:
            out += tl.sum(B * H, axis=1)[:, None]
        else:
            out = tl.dot(B, tl.trans(H), out, input_precision="ieee")
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    wanted = is_row[:, None] & is_token[None, :]
    tl.store(y + tokens[None, :] * d_out + rows[:, None], out.to(y.dtype.element_ty), mask=wanted)


def _tuned(configs: list[tuple[int, int, int]]) -> Any:
    """`multiply` with the fastest (rows, bytes of the bitmask, warps); the first where nothing can be timed."""
    choices = [triton.Config({"ROWS": r, "BYTES": b}, num_warps=w) for r, b, w in configs]
    if _INTERPRETED:
        choices = choices[:1]
    return triton.autotune(choices, key=["d_in", "d_out"])(triton.jit(multiply))


_project = triton.jit(project)
# Every row block of a one-token call is small, so that there are several for each multiprocessor.
ONE_TOKEN = [(4, 32, 4), (4, 64, 4), (4, 128, 8), (2, 128, 4), (8, 32, 4)]
SOME_TOKENS = [(16, 16, 4), (16, 32, 4), (32, 16, 4), (32, 8, 4)]
_multiply_one, _multiply_some = _tuned(ONE_TOKEN), _tuned(SOME_TOKENS)
