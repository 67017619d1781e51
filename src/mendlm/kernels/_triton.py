"""Packed weights on CUDA, in Triton: products with few tokens, S as a dense matrix, and low-rank sums for many tokens.

Import this module only where Triton is installed and wanted. `TRITON_INTERPRET=1`, set before Triton is imported, runs
the kernels on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = bool(triton.knobs.runtime.interpret)
HAS_OVERLAP = not _INTERPRETED and hasattr(tl.extra.cuda, "gdc_wait")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    values, bitmask, row_starts = values.contiguous(), bitmask.contiguous(), row_starts.contiguous()
    # Four entries of two bytes are read as one word where all begin at a word.
    words = values.itemsize == 2 and d_in % 8 == 0 and values.data_ptr() % 8 == 0 and tokens.data_ptr() % 8 == 0
    block = 1 if n_tokens == 1 else 16
    n_blocks = triton.cdiv(n_tokens, block)

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(d_out, chosen["ROWS"]), n_blocks

    with _on(x):
        h, lora_B = _project(tokens, lora_A), lora_B.contiguous()
        b = y if bias is None else bias.contiguous()
        shape = {"n_bytes": bitmask.shape[1], "rank": rank, "HAS_BIAS": bias is not None, "enable_fp_fusion": True}
        if block == 1 and words and half_of:
            positions = _positions(x.device) if half_of == 8 else bitmask
            _multiply_one[grid](
                tokens,
                values,
                bitmask,
                positions,
                h,
                lora_B,
                b,
                y,
                d_out,
                **shape,
                GROUP=half_of,
                **_overlap(x, rank > 0),
            )
        else:
            operands = (tokens, values, bitmask, row_starts, h, lora_B, b, y, n_tokens, d_in, d_out)
            # The interpreter multiplies the bits of bfloat16 as integers.
            constants = {"TOKENS": block, "WORDS": words and half_of > 0, "WIDEN": _INTERPRETED}
            (_multiply_single if block == 1 else _multiply_some)[grid](*operands, **shape, **constants)
    return y.reshape(*x.shape[:-1], d_out)


def unpack(values: Tensor, bitmask: Tensor, row_starts: Tensor, d_in: int, half_of: int = 0) -> Tensor:
    """`mendlm.kernels.packed.unpack`, which checks the shapes. Any dtype of 1, 2, 4 or 8 bytes."""
    d_out = bitmask.shape[0]
    S = values.new_empty(d_out, d_in)
    if S.numel() == 0:
        return S
    numbers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    values = values.contiguous().view(numbers)
    words = half_of > 0 and values.itemsize == 2 and d_in % 8 == 0 and values.data_ptr() % 8 == 0
    rows, n_bytes = 4, 64
    with _on(values):
        _unpack[(triton.cdiv(d_out, rows),)](
            values,
            bitmask.contiguous(),
            row_starts.contiguous(),
            S.view(numbers),
            d_in,
            d_out,
            bitmask.shape[1],
            WORDS=words,
            ROWS=rows,
            BYTES=n_bytes,
        )
    return S


def add_product(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    """``y + h @ lora_B.T`` into `y` (n_tokens, d_out) and back, with sums in float32; all of one dtype of two bytes.

    cuBLAS takes 159 µs for as few columns, where the bytes of y need 60 (H100, bfloat16, 4096 x 11008, rank 128).
    """
    n_tokens, d_out = y.shape
    rank = h.shape[1]
    if y.numel() and rank:
        grid = (triton.cdiv(d_out, 128), triton.cdiv(n_tokens, 64))
        with _on(y):
            _add_product[grid](y, h.contiguous(), lora_B.contiguous(), n_tokens, d_out, rank, WIDEN=_INTERPRETED)
    return y


def beside(x: Tensor, h: Tensor, n_rows: int, width: int) -> Tensor:
    """(n_rows, width): x (n, d_in) with h (n, rank) beside it, two of its columns and two of zeros by turns.

    What is below n and beyond rank is zero; `width` - d_in is a multiple of 4 and at least 2 · rank. All of one dtype.
    """
    (n_tokens, d_in), rank = x.shape, h.shape[1]
    wide = x.new_empty(n_rows, width)
    if wide.numel():
        columns = 1024
        with _on(x):
            grid = (n_rows, triton.cdiv(width, columns))
            _beside[grid](x.contiguous(), h.contiguous(), wide, n_tokens, d_in, rank, width, COLUMNS=columns)
    return wide


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of `x`, for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _overlap(x: Tensor, wanted: bool = True) -> dict[str, bool]:
    """Whether a kernel may begin before the one before it has ended, as Hopper and later devices can."""
    able = wanted and HAS_OVERLAP and x.is_cuda and _is_hopper(x.device)
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Or later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _positions(device: torch.device) -> Tensor:
    """(256,) int32: for each byte that keeps four columns, 16 times each of them, the first in the lowest byte."""
    table = [0] * 256
    for byte in range(256):
        kept = [column for column in range(8) if byte >> column & 1]
        if len(kept) == 4:
            table[byte] = sum(16 * column << 8 * place for place, column in enumerate(kept))
    return torch.tensor(table, dtype=torch.int32, device=device)


def _project(tokens: Tensor, lora_A: Tensor) -> Tensor:
    """``x Aᵀ`` (n_tokens, rank) float32, with sums in float32."""
    (n_tokens, d_in), rank = tokens.shape, lora_A.shape[0]
    if n_tokens == 1 and rank:
        h = tokens.new_empty(1, rank, dtype=torch.float32)
        overlap = _overlap(tokens)
        _project_one[(rank,)](tokens, lora_A.contiguous(), h, d_in, COLUMNS=4096, enable_fp_fusion=True, **overlap)
    elif tokens.dtype == torch.float32 or not tokens.is_cuda:
        h = tokens.float() @ lora_A.float().T
    else:
        h = torch.mm(tokens, lora_A.T, out_dtype=torch.float32)
    return h


def project_one(
    x: tl.tensor,
    lora_A: tl.tensor,
    h: tl.tensor,
    d_in: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One row of A with one token."""
    if OVERLAP:  # all that came before has ended, and what comes next may begin
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.static_range(0, d_in, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < d_in
        a = tl.load(lora_A + row * d_in + columns, mask=inside, other=0.0).to(tl.float32)
        sums += a * tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row, tl.sum(sums, axis=0))


_project_one = triton.jit(project_one)


def number(word: tl.tensor, place: tl.constexpr, like: tl.tensor) -> tl.tensor:
    """One of the four entries of two bytes in an int64 `word`, of the dtype that `like` points to, as float32."""
    half = (word >> (32 * (place // 2))).to(tl.uint32)
    if like.dtype.element_ty == tl.bfloat16:  # the upper half of a float32
        bits = (half << 16) if place % 2 == 0 else (half & 0xFFFF0000)
        value = bits.to(tl.float32, bitcast=True)
    else:
        bits = (half & 0xFFFF) if place % 2 == 0 else (half >> 16)
        value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


_number = triton.jit(number)


def number_at(low: tl.tensor, high: tl.tensor, position: tl.tensor, like: tl.tensor) -> tl.tensor:
    """One of the eight entries of two bytes in two int64 words, 16 times its place given, as `number` does."""
    word = tl.where((position & 64) != 0, high, low)
    return _number(word >> (position & 63).to(tl.int64), 0, like)


_number_at = triton.jit(number_at)


def multiply_one(
    x: tl.tensor,
    values: tl.tensor,
    bitmask: tl.tensor,
    positions: tl.tensor,
    h: tl.tensor,
    lora_B: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    d_out: tl.tensor,
    n_bytes: tl.constexpr,
    rank: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    APART: tl.constexpr,
) -> None:
    """A block of rows of a 2:4 or 4:8 matrix with one token; entries of two bytes.

    Of two in four, the first kept column is one of the first three and the second one of the last three, so that two
    choices for each entry of S pick its x. Of four in eight, a table says which the columns of each byte are. Integer
    operations cost twice what others do, so there are few.

    Parameters
    ----------
    positions : what `_positions` gives; not read with GROUP = 4.
    GROUP : 4 or 8, of which the half is kept.
    OVERLAP : whether h is being computed while this kernel begins.
    APART : whether every row reads x for itself, from the cache; otherwise threads exchange it.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < d_out
    row_values = values + rows * (4 * n_bytes)
    sums = tl.zeros((ROWS, BYTES), tl.float32)
    x_words = x.to(tl.pointer_type(tl.int64))
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    for start in tl.static_range(0, n_bytes, BYTES):
        places = start + tl.arange(0, BYTES)
        inside = places < n_bytes
        wanted = is_row[:, None] & inside[None, :]
        if APART:
            at = x_words + (2 * places[None, :] + 0 * rows[:, None])
            x_low = tl.load(at, mask=wanted, other=0)
            x_high = tl.load(at + 1, mask=wanted, other=0)
        else:
            x_low = tl.load(x_words + 2 * places, mask=inside, other=0)[None, :]
            x_high = tl.load(x_words + 2 * places + 1, mask=inside, other=0)[None, :]
        at_byte = bitmask + rows[:, None] * n_bytes + places[None, :]
        byte = tl.load(at_byte, mask=wanted, other=0, eviction_policy="evict_first").to(tl.uint32)
        at_word = (row_values[:, None] + 4 * places[None, :]).to(tl.pointer_type(tl.int64))
        word = tl.load(at_word, mask=wanted, other=0, eviction_policy="evict_first")
        if GROUP == 8:
            four = tl.load(positions + byte)
            for place in tl.static_range(4):
                sums += _number(word, place, values) * _number_at(x_low, x_high, four >> (8 * place), x)
        else:
            for part in tl.static_range(2):
                X = x_low if part == 0 else x_high
                X1, X2 = _number(X, 1, x), _number(X, 2, x)
                bits = byte >> (4 * part)
                one = tl.where((bits & 1) != 0, _number(X, 0, x), tl.where((bits & 2) != 0, X1, X2))
                other = tl.where((bits & 8) != 0, _number(X, 3, x), tl.where((bits & 4) != 0, X2, X1))
                sums += _number(word, 2 * part, values) * one
                sums += _number(word, 2 * part + 1, values) * other
    for start in tl.static_range(0, rank, BYTES):
        ranks = start + tl.arange(0, BYTES)
        wanted = is_row[:, None] & (ranks < rank)[None, :]
        B = tl.load(lora_B + rows[:, None] * rank + ranks[None, :], mask=wanted, other=0.0).to(tl.float32)
        if OVERLAP and start == 0:
            tl.extra.cuda.gdc_wait()
        sums += B * tl.load(h + ranks, mask=ranks < rank, other=0.0)[None, :]
    out = tl.sum(sums, axis=1)
    if HAS_BIAS:
        out += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=is_row)


def bytes_of(
    bitmask: tl.tensor,
    row_values: tl.tensor,
    rows: tl.tensor,
    is_row: tl.tensor,
    places: tl.tensor,
    n_before: tl.tensor,
    n_bytes: tl.constexpr,
    WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What `entry` needs of the bytes (rows, places) of a bitmask, and `n_before` after them.

    The kept values of a row lie one after the other, so the place of each is the number of bits set before its own.

    Parameters
    ----------
    row_values : where the values of each row begin.
    n_before : how many of them come before these bytes; not counted with WORDS, as every byte keeps four.
    """
    wanted = is_row[:, None] & (places < n_bytes)[None, :]
    byte = tl.load(bitmask + rows[:, None] * n_bytes + places[None, :], mask=wanted, other=0).to(tl.uint32)
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    counts = spread * 0x11111111
    if WORDS:
        first = row_values[:, None] + 4 * places[None, :]
        word = tl.load(first.to(tl.pointer_type(tl.int64)), mask=wanted, other=0)
    else:
        word = (counts >> 28).to(tl.int32)  # how many the byte keeps; nobody asks for more
        first = row_values[:, None] + (n_before[:, None] + tl.cumsum(word, axis=1) - word)
        n_before += tl.sum(word, axis=1)
    return first, word, spread, counts, n_before


_bytes_of = triton.jit(bytes_of)


def entry(
    bit: tl.constexpr, first: tl.tensor, word: tl.tensor, spread: tl.tensor, counts: tl.tensor, WORDS: tl.constexpr
) -> tl.tensor:
    """Column `bit` of every byte, in the dtype of the values; 0 where it is not kept.

    Parameters
    ----------
    first : where the values of each byte begin.
    word : its four values, if WORDS.
    spread, counts : its bits, one in each nibble, and how many of them are set up to there.
    """
    is_kept = ((spread >> (4 * bit)) & 1) != 0
    place = ((counts >> (4 * bit)) & 15).to(tl.int32) - 1
    dtype = first.dtype.element_ty
    if WORDS:
        half = (word >> (16 * (place & 3)).to(tl.int64)).to(tl.int16)
        value = tl.where(is_kept, half, 0).to(dtype, bitcast=True)
    else:
        value = tl.load(first + place, mask=is_kept, other=0)
    return value


_entry = triton.jit(entry)


def entries(first: tl.tensor, word: tl.tensor, spread: tl.tensor, counts: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    """All columns of the bytes (rows, bytes): (rows, bytes, 2, 2, 2), the last three being the bits of the column."""
    S0 = tl.join(_entry(0, first, word, spread, counts, WORDS), _entry(4, first, word, spread, counts, WORDS))
    S1 = tl.join(_entry(1, first, word, spread, counts, WORDS), _entry(5, first, word, spread, counts, WORDS))
    S2 = tl.join(_entry(2, first, word, spread, counts, WORDS), _entry(6, first, word, spread, counts, WORDS))
    S3 = tl.join(_entry(3, first, word, spread, counts, WORDS), _entry(7, first, word, spread, counts, WORDS))
    return tl.join(tl.join(S0, S2), tl.join(S1, S3))


_entries = triton.jit(entries)


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
    WORDS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """A block of rows with a block of tokens, 8 x BYTES columns after the other.

    With one token a thread takes single entries, so that neighbours read neighbours, and keeps its own sums to the end;
    with more it takes whole bytes and goes through their bits by turns.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    is_row, is_token = rows < d_out, tokens < n_tokens
    row_values = values + tl.load(row_starts + rows, mask=is_row, other=0)
    n_before = tl.zeros((ROWS,), tl.int32)
    bit = tl.arange(0, 8)
    nibble = (4 * bit).to(tl.uint32)[None, None, :]
    if TOKENS == 1:
        sums = tl.zeros((ROWS, BYTES, 8), tl.float32)
    else:
        sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, n_bytes, BYTES):
        places = start + tl.arange(0, BYTES)
        found = _bytes_of(bitmask, row_values, rows, is_row, places, n_before, n_bytes, WORDS)
        first, word, spread, counts, n_before = found
        if TOKENS == 1:
            is_kept = ((spread[:, :, None] >> nibble) & 1) != 0
            within = ((counts[:, :, None] >> nibble) & 15).to(tl.int32) - 1
            S = tl.load(first[:, :, None] + within, mask=is_kept, other=0.0)
            columns = 8 * places[:, None] + bit[None, :]
            X = tl.load(x + tl.program_id(1) * d_in + columns, mask=columns < d_in, other=0.0)
            sums += S.to(tl.float32) * X.to(tl.float32)[None, :, :]
        else:
            columns = 8 * start + tl.arange(0, 8 * BYTES)
            wanted = is_token[:, None] & (columns < d_in)[None, :]
            X = tl.load(x + tokens[:, None] * d_in + columns[None, :], mask=wanted, other=0.0)
            S = tl.reshape(_entries(first, word, spread, counts, WORDS), (ROWS, 8 * BYTES))
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


def unpack_rows(
    values: tl.tensor,
    bitmask: tl.tensor,
    row_starts: tl.tensor,
    S: tl.tensor,
    d_in: tl.tensor,
    d_out: tl.tensor,
    n_bytes: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """A block of rows of S, as `multiply` finds its entries; of any integers."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < d_out
    row_values = values + tl.load(row_starts + rows, mask=is_row, other=0)
    n_before = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n_bytes, BYTES):
        places = start + tl.arange(0, BYTES)
        found = _bytes_of(bitmask, row_values, rows, is_row, places, n_before, n_bytes, WORDS)
        first, word, spread, counts, n_before = found
        columns = 8 * start + tl.arange(0, 8 * BYTES)
        wanted = is_row[:, None] & (columns < d_in)[None, :]
        block = tl.reshape(_entries(first, word, spread, counts, WORDS), (ROWS, 8 * BYTES))
        tl.store(S + rows[:, None] * d_in + columns[None, :], block, mask=wanted)


_unpack = triton.jit(unpack_rows)


def add_a_product(
    y: tl.tensor,
    h: tl.tensor,
    lora_B: tl.tensor,
    n_tokens: tl.tensor,
    d_out: tl.tensor,
    rank: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """A block of y, 64 tokens x 128 rows of B; y is read last, in the order in which it is written."""
    tokens = (tl.program_id(1) * 64 + tl.arange(0, 64)).to(tl.int64)
    rows = (tl.program_id(0) * 128 + tl.arange(0, 128)).to(tl.int64)
    is_token, is_row = (tokens < n_tokens)[:, None], rows < d_out
    sums = tl.zeros((64, 128), tl.float32)
    for start in tl.static_range(0, rank, 128):
        ranks = start + tl.arange(0, 128)
        is_rank = (ranks < rank)[None, :]
        H = tl.load(h + tokens[:, None] * rank + ranks[None, :], mask=is_token & is_rank, other=0.0)
        B = tl.load(lora_B + rows[:, None] * rank + ranks[None, :], mask=is_row[:, None] & is_rank, other=0.0)
        if WIDEN:
            H, B = H.to(tl.float32), B.to(tl.float32)
        sums = tl.dot(H, tl.trans(B), sums, input_precision="ieee")
    place = y + tokens[:, None] * d_out + rows[None, :]
    inside = is_token & is_row[None, :]
    before = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (before.to(tl.float32) + sums).to(before.dtype), mask=inside)


def put_beside(
    x: tl.tensor,
    h: tl.tensor,
    wide: tl.tensor,
    n_tokens: tl.tensor,
    d_in: tl.tensor,
    rank: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of a row of `wide`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = (token + tl.zeros_like(columns)) < n_tokens
    of_x = tl.load(x + token * d_in + columns, mask=is_token & (columns < d_in), other=0.0)
    place = columns - d_in
    ranks = place // 4 * 2 + place % 4
    is_h = is_token & (place >= 0) & (place % 4 < 2) & (ranks < rank)
    of_h = tl.load(h + token * rank + ranks, mask=is_h, other=0.0)
    tl.store(wide + token * width + columns, tl.where(is_h, of_h, of_x), mask=columns < width)


_add_product = triton.jit(add_a_product)
_beside = triton.jit(put_beside)


def _tuned(kernel: Any, configs: list[tuple[dict[str, Any], int]], *more: str) -> Any:
    """A kernel with the fastest of some constants and warps; the first where nothing can be timed."""
    choices = [triton.Config(constants, num_warps=warps) for constants, warps in configs]
    if _INTERPRETED:
        choices = choices[:1]
    return triton.autotune(choices, key=["n_bytes", "d_out", *more])(triton.jit(kernel))


def _block(rows: int, n_bytes: int, warps: int, **more: Any) -> tuple[dict[str, Any], int]:
    return {"ROWS": rows, "BYTES": n_bytes, **more}, warps


# What was fastest on the MLP shapes of LLaMA-7B (H100, bfloat16), and what came near; each costs a second at the first
# call for a shape.
HALF = [_block(1, 512, 4, APART=True), _block(1, 256, 2, APART=True), _block(4, 128, 2, APART=False)]
ONE_TOKEN = [_block(2, 128, 4), _block(4, 64, 4)]
SOME_TOKENS = [_block(32, 16, 4), _block(32, 32, 4), _block(16, 32, 4)]
_multiply_one = _tuned(multiply_one, HALF, "GROUP")
_multiply_single = _tuned(multiply, ONE_TOKEN)
_multiply_some = _tuned(multiply, SOME_TOKENS, "WORDS")
