"""The safetensors header: parsed with every check, and written byte for byte as safetensors itself writes it.

A file is ``<u64 little-endian: length n of the header> <n bytes of JSON> <data>``. The JSON maps each tensor's name to
its dtype, shape and ``[start, end)`` within the data; ``__metadata__`` maps strings to strings. The data has neither
holes nor overlaps nor a tail. We read it ourselves because memory must stay flat (a mapped file counts as resident) and
because a damaged file deserves a sentence that says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mendlm.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMS = 64  # NumPy's limit; torch has the same for most operations
MAX_NAME_CHARS = 1024  # far above any model's; keeps what is quadratic in a name, and int() of its digits, cheap
_MAX_BITS = 2**66  # of a tensor: no file is larger than 2**63 bytes

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200

# safetensors name -> bits of an entry (safetensors 0.8, `Dtype`).
DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# The dtypes that can be compressed or converted; every other one is copied as it is.
FLOATING: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_STORED_AS = {dtype: name for name, dtype in FLOATING.items()}


def safetensors_name(dtype: torch.dtype) -> str:
    """The safetensors name of a floating dtype."""
    return _STORED_AS[dtype]


def torch_name(dtype: str) -> str:
    """The name people know: ``"bfloat16"`` for ``"BF16"``; dtypes we only copy keep their safetensors name."""
    return str(FLOATING[dtype]).removeprefix("torch.") if dtype in FLOATING else dtype


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: where its bytes are, counted from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Length of its data."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes
    ----------
    tensors : in the order of their data.
    metadata : the strings under ``__metadata__``.
    data_start : offset of the data in the file.
    sha256 : of the length and the JSON.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int
    sha256: str
    by_name: Mapping[str, TensorInfo] = field(repr=False)


def check_shape(info: TensorInfo, file: str, wanted: tuple[int, ...]) -> None:
    """Refuse a tensor of `file` that has not the shape that the model has for it.

    Raises
    ------
    CheckpointError : it has another one.
    """
    if info.shape != wanted:
        raise CheckpointError(
            f"{info.name!r} in {file} has shape {info.shape}, and the model of config.json has {wanted} there. "
            "They are of different models: fetch both again."
        )


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; entries of 4 or 6 bits are stored without gaps."""
    return prod(shape) * DTYPE_BITS[dtype] // 8


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file, and the file's size; no tensor is read.

    Raises
    ------
    CheckpointError : the file cannot be read, is empty, truncated, too long, or its header breaks the format.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return parse_header(file, size, path.name)
    except OSError as err:
        raise CheckpointError(f"cannot read {path.name!r}: {err.strerror or err}.") from err


def parse_header(file: BinaryIO, size: int, name: str) -> Header:
    """`read_header` of an open file of `size` bytes that is called `name`; errors the same, but for `OSError`."""
    raw = _read_raw(file, size, name)
    try:
        parsed = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as err:
        raise _damaged(name, f"its header is not valid JSON ({shorten(str(err))[1:-1]})") from err
    if not isinstance(parsed, dict):
        raise _damaged(name, "its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(name, "__metadata__ does not map strings to strings")
    if not all(map(is_text, (*metadata, *metadata.values()))):
        raise _damaged(name, "__metadata__ holds half of a surrogate pair, which is no character")
    infos = sorted((_parse_info(name, n, e) for n, e in parsed.items()), key=lambda t: (t.start, t.end))
    _check_contiguous(name, infos)
    _check_size(name, size, len(raw) + (infos[-1].end if infos else 0))
    digest = hashlib.sha256(raw).hexdigest()
    return Header(tuple(infos), metadata, len(raw), digest, {t.name: t for t in infos})


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Lay out a file.

    Parameters
    ----------
    tensors : (name, dtype, shape) in any order.
    metadata : strings for ``__metadata__``; empty for none.

    Returns
    -------
    header : length and JSON, padded with blanks to a multiple of 8 bytes.
    infos : in the order of their data: widest dtype first, so that every tensor is aligned to its dtype (torch refuses
        to view one that is not), then by name.

    Raises
    ------
    CheckpointError : two tensors of one name.
    """
    infos: list[TensorInfo] = []
    end = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPE_BITS[t[1]], t[0])):
        start, end = end, end + tensor_bytes(dtype, shape)
        infos.append(TensorInfo(name, dtype, shape, start, end))
    parsed: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for info in infos:
        if info.name in parsed:
            raise CheckpointError(f"two tensors would be stored under the name {info.name!r}. Exclude one of them.")
        parsed[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.start, info.end]}
    text = json.dumps(parsed, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, tuple(infos)


def _read_raw(file: BinaryIO, size: int, name: str) -> bytes:
    """The length field and the JSON, as they are in the file."""
    if size == 0:
        raise CheckpointError(f"{name!r} is empty. The download is probably incomplete: fetch that file again.")
    start = file.read(8)
    if start.startswith(b"version "):
        raise CheckpointError(f"{name!r} is a Git LFS pointer, not the weights themselves. Run 'git lfs pull'.")
    if len(start) < 8:
        raise _damaged(name, f"it has only {size} bytes")
    length = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER_BYTES:
        raise _damaged(name, f"its first 8 bytes announce a header of {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        _check_size(name, size, 8 + length)
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{name!r} became shorter while it was read. Do not change it meanwhile.")
    return start + text


def _parse_info(file: str, name: str, entry: Any) -> TensorInfo:
    if len(name) > MAX_NAME_CHARS or not is_text(name):
        why = "half of a surrogate pair" if len(name) <= MAX_NAME_CHARS else f"{len(name)} characters"
        raise _damaged(file, f"the name {shorten(name)} of a tensor has {why}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"the header entry of {name!r} does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(file, f"{name!r} has unknown dtype {shorten(dtype)}")
    if not _counts(shape):
        raise _damaged(file, f"{name!r} has shape {shorten(shape)}, which is not a list of whole numbers >= 0")
    if len(shape) > MAX_DIMS:
        raise _damaged(file, f"{name!r} has {len(shape)} dimensions, the limit is {MAX_DIMS}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"{name!r} has data_offsets {shorten(offsets)}, which are not a start and an end")
    n_bits = prod(shape) * DTYPE_BITS[dtype]
    if prod(n for n in shape if n) * DTYPE_BITS[dtype] > _MAX_BITS:  # an empty tensor of absurd sides, too
        raise _damaged(file, f"{name!r} has shape {shorten(shape)}, which no file can hold")
    if n_bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(
            file,
            f"{name!r} of dtype {dtype} and shape {shorten(shape)} needs {n_bits / 8:.15g} bytes, its data_offsets are "
            f"{offsets}",
        )
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def shorten(value: object) -> str:
    """`repr` of something from a file for a message, cut to a bearable length."""
    return _repr.repr(value)


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; JSON can smuggle in halves of surrogate pairs."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_contiguous(file: str, infos: Iterable[TensorInfo]) -> None:
    end = 0
    for info in infos:
        if info.start != end:
            kind = "overlaps the tensor before it" if info.start < end else f"leaves a hole of {info.start - end} bytes"
            raise _damaged(file, f"{info.name!r} starts at byte {info.start} and {kind}")
        end = info.end


def _check_size(file: str, size: int, expected: int) -> None:
    if size < expected:
        raise CheckpointError(
            f"{file!r} is {expected - size} bytes shorter than its header says ({size} of {expected}). "
            "The download is probably incomplete: fetch that file again."
        )
    if size > expected:
        raise _damaged(
            file, f"it is {size - expected} bytes longer than its header says ({size} instead of {expected})"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return parsed


def _damaged(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file!r} is not a sound safetensors file: {why}. Fetch that file again.")
