"""Reading a GGUF file with the `gguf` package alone: the independent side of the check in `gguf.import_gguf`."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mendlm.errors import CheckpointError, MissingDependencyError, UsageError

# Architectures whose tensors are the checkpoint's own under other names. True: llama.cpp's converter reorders the rows
# of q_proj and k_proj for its interleaved rotary embedding, and that has to be undone.
PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}

# Tensors that are no weights of the model: what they say goes into the config (see `llama3_rope`).
NOT_WEIGHTS = {"rope_freqs.weight"}

# Rotary scaling of the Llama 3.1 and 3.2 models (their config.json); the factor is read off the tensor. [8192 is the
# context the base models were trained on, 1 and 4 the low and high frequency factors.]
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


# GGUF's types of values: those of a fixed size, by struct's letter; strings and arrays.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # ggml's
# The gguf package makes a few Python objects for each entry of an array. [The largest vocabularies have 2**18 tokens.]
_MAX_ENTRIES = 2**22


def check_gguf(raw: memoryview | mmap.mmap, name: str) -> None:
    """Walk over the header of the GGUF file `name`, whose bytes are `raw`, and check every length before it is used.

    The gguf package takes lengths and counts as they are, and a damaged one keeps it busy until memory ends.

    Raises
    ------
    CheckpointError : a count, length, type or offset that cannot be.
    """
    try:
        _Walk(raw).check()
    except (struct.error, ValueError, OverflowError) as err:
        raise CheckpointError(
            f"{name!r} is not a whole GGUF file ({len(raw)} bytes): {err}. The download is probably incomplete: "
            "fetch it again."
        ) from err


def _reader(path: Path) -> Any:
    """`gguf.GGUFReader` of the file, four times as fast: the slices of a memmap are memmaps, which Python makes."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = self.data.view(np.ndarray)
            return super()._get(*args, **kwargs)

    return Reader(str(path))


class _Walk:
    """A position in a GGUF file; `struct.error` and ValueError say what is wrong."""

    def __init__(self, raw: memoryview | mmap.mmap) -> None:
        self._raw = raw
        self._at = 4
        self._n_entries = 0

    def check(self) -> None:
        """The whole header."""
        version = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"it has version {version}, and 2 and 3 are known")
        n_tensors, n_fields = self._take("Q"), self._take("Q")
        if 13 * n_fields + 24 * n_tensors > len(self._raw):
            raise ValueError(f"it announces {n_fields} fields and {n_tensors} tensors, more than it has room for")
        fields: dict[bytes, Any] = {}
        for _ in range(n_fields):
            key = self._text()
            if key in fields:
                raise ValueError(f"the field {key[:80]!r} occurs twice")
            fields[key] = self._value(self._take("I"))
        for key, value in fields.items():
            if key.endswith(b".block_count") and not (type(value) is int and 0 <= value <= n_tensors):
                raise ValueError(f"{key[:80]!r} is {value!r:.80}, and it has {n_tensors} tensors")
        alignment = fields.get(b"general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"general.alignment is {alignment!r:.80}")
        self._check_tensors(n_tensors, alignment)

    def _check_tensors(self, n_tensors: int, alignment: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        ends, names = 0, set()
        for _ in range(n_tensors):
            name = self._text()
            if name in names:
                raise ValueError(f"the tensor {name[:80]!r} occurs twice")
            names.add(name)
            n_dims = self._take("I")
            if n_dims > _MAX_DIMS:
                raise ValueError(f"{name[:80]!r} has {n_dims} dimensions, the limit is {_MAX_DIMS}")
            n_elements = math.prod([self._take("Q") for _ in range(n_dims)])
            kind, offset = self._take("I"), self._take("Q")
            if kind not in sizes:
                raise ValueError(f"{name[:80]!r} has type {kind}, which is not known")
            block, block_bytes = sizes[kind]
            if n_elements % block or offset % alignment:
                raise ValueError(
                    f"{name[:80]!r} has {n_elements} entries at offset {offset}, which do not fit its type"
                )
            ends = max(ends, offset + n_elements // block * block_bytes)
        start = -(-self._at // alignment) * alignment
        if n_tensors and start + ends > len(self._raw):
            raise ValueError(f"its tensors end at byte {start + ends}")

    def _take(self, kind: str) -> Any:
        value: Any
        (value,) = struct.unpack_from(f"<{kind}", self._raw, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > len(self._raw) - self._at:
            raise ValueError(f"a value of {n_bytes} bytes at byte {self._at} leads out of it")
        self._at += n_bytes

    def _text(self) -> bytes:
        n_bytes, start = self._take("Q"), self._at
        self._skip(n_bytes)
        text = bytes(self._raw[start : self._at])
        text.decode()
        return text

    def _value(self, kind: int, depth: int = 0) -> Any:
        """A field's value; None for arrays, which are passed over."""
        if kind in _SCALARS:
            return self._take(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or depth > 1:
            raise ValueError(f"a value at byte {self._at} has type {kind}, which is not known there")
        inner, n = self._take("I"), self._take("Q")
        self._n_entries += n
        if self._n_entries > _MAX_ENTRIES:
            raise ValueError(f"its arrays have more than {_MAX_ENTRIES} entries")
        if inner in _SCALARS:
            self._skip(n * struct.calcsize(f"<{_SCALARS[inner]}"))
        else:
            for _ in range(n):
                self._value(inner, depth + 1)
        return None


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. Tensors are read, and dequantized to float32, one at a time."""

    path: Path
    reader: Any
    tensors: dict[str, Any]
    architecture: str

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Open and check a file: magic, version, metadata, and that every tensor lies inside it."""
        if not path.exists():
            raise UsageError(f"no such file: {str(path)!r}. Give the path of a .gguf file.")
        if not path.is_file():
            raise UsageError(f"{str(path)!r} is not a file. Give one .gguf file.")
        try:
            import gguf  # noqa: F401
        except ImportError as err:
            raise MissingDependencyError(
                "importing a GGUF file needs the gguf package: pip install 'mendlm[gguf]'."
            ) from err
        try:
            with path.open("rb") as raw:
                magic = raw.read(4)
        except OSError as err:
            raise UsageError(f"cannot read {str(path)!r}: {err}. Check the file and its permissions.") from err
        if magic != b"GGUF":
            raise UsageError(f"{str(path)!r} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'.")
        with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            check_gguf(mapped, path.name)
        try:
            reader = _reader(path)
            name = reader.fields["general.architecture"].contents()
            parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError, struct.error) as err:
            raise CheckpointError(
                f"{str(path)!r} is not a whole GGUF file ({path.stat().st_size} bytes): {type(err).__name__}: {err}. "
                "The download is probably incomplete: fetch it again."
            ) from err
        if parts != 1 and parts != 0:
            raise UsageError(f"{str(path)!r} is one part of a split GGUF. Merge it first with gguf-split --merge.")
        if not reader.tensors:
            raise CheckpointError(f"{str(path)!r} holds no tensors, only metadata. Give the file with the weights.")
        return cls(path, reader, {tensor.name: tensor for tensor in reader.tensors}, str(name))

    @property
    def n_parameters(self) -> int:
        """Number of weights in the file."""
        return sum(int(tensor.n_elements) for tensor in self.tensors.values())

    @property
    def layout_known(self) -> bool:
        """Whether `expected` can say what every tensor of the checkpoint must be."""
        return self.architecture in PERMUTED

    def value(self, key: str, default: Any = None) -> Any:
        """Metadata value under ``<architecture>.key``."""
        found = self.reader.fields.get(f"{self.architecture}.{key}")
        return default if found is None else found.contents()

    def number(self, key: str, default: float | None = None) -> float:
        """A metadata value that must be a finite number; errors: `CheckpointError`."""
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise CheckpointError(
                f"{self.path.name!r} has {found!r:.80} for {self.architecture}.{key}, which must be a finite number. "
                "Fetch it again, or use the original checkpoint."
            )
        return found

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """While the block runs, `gguf.GGUFReader` gives this file's reader to all who open the file.

        transformers parses the header for the config, the weights and the tokenizer, and builds the table of names for
        every module: 25 of the 40 s that SmolLM2-135M took. What they get is the same. Not for threads.
        """
        import gguf

        open_anew, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

        def reader(path: Any, mode: Any = "r") -> Any:
            return self.reader if mode == "r" and os.path.samefile(path, self.path) else open_anew(path, mode)

        gguf.GGUFReader = reader
        gguf.get_tensor_name_map = functools.cache(name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = open_anew, name_map

    def dequantized(self, name: str) -> Tensor:
        """Tensor `name` in float32, torch's order of dimensions."""
        import gguf
        import numpy as np

        tensor = self.tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only

    def expected(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """For each tensor `names` of a checkpoint, what the file says it is, in float32.

        Raises
        ------
        CheckpointError : a tensor has no counterpart in the file, or one of the file's is not among `names`.
        """
        source = self._sources_of(names)
        missing = [name for name, origin in source.items() if origin not in self.tensors]
        unused = sorted(set(self.tensors) - set(source.values()) - NOT_WEIGHTS)
        if missing or unused:
            what = f"{missing[0]!r} has no counterpart in it" if missing else f"its tensor {unused[0]!r} was not used"
            raise CheckpointError(
                f"{self.path.name!r} and what transformers made of it hold different tensors: {what} "
                f"({len(missing)} and {len(unused)} such). It would not be the file's model; nothing was kept."
            )
        for name in names:
            W = self.dequantized(source[name])
            yield name, self._unpermuted(name, W) if PERMUTED[self.architecture] else W

    def _sources_of(self, names: list[str]) -> dict[str, str]:
        """The file's name of each tensor of a checkpoint; its own name where there is none."""
        import gguf

        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        table = gguf.get_tensor_name_map(arch, int(self.number("block_count")))
        sources = {}
        for name in names:
            module, _, kind = name.rpartition(".")
            origin = table.get_name(module)
            sources[name] = name if origin is None else f"{origin}.{kind}"
        return sources

    def _unpermuted(self, name: str, W: Tensor) -> Tensor:
        """Undo the converter's reordering: in each head, rows (d/2, 2) interleaved back to two halves (2, d/2)."""
        n_heads = int(self.number("attention.head_count"))
        if ".k_proj." in name:
            n_heads = int(self.number("attention.head_count_kv", n_heads))
        elif ".q_proj." not in name:
            return W
        return W.reshape(n_heads, -1, 2, *W.shape[1:]).transpose(1, 2).reshape(W.shape)

    def check_numbers(self) -> None:
        """Refuse settings of the architecture that would make a model of NaN."""
        for key in self.reader.fields:
            prefix, _, setting = key.partition(".")
            if prefix == self.architecture and isinstance(self.value(setting), float):
                self.number(setting)
        base = self.number("rope.freq_base", 10_000.0)
        if base <= 0:
            raise CheckpointError(
                f"{self.path.name!r} has {base:g} for {self.architecture}.rope.freq_base, which must be above 0. Fetch "
                "it again, or use the original checkpoint."
            )

    def check_rope(self) -> None:
        """Refuse rotary scaling that transformers would drop without a word."""
        kind = self.value("rope.scaling.type", "none")
        factor = float(self.number("rope.scaling.factor", self.value("rope.scale_linear", 1.0)))
        if self.architecture != "gpt-oss" and (kind not in ("none", "linear") or factor != 1.0):
            raise CheckpointError(
                f"{self.path.name!r} scales its rotary embedding ({kind}, factor {factor:g}), which transformers does "
                "not read from GGUF: the imported model would see wrong positions. Use the original checkpoint."
            )

    def llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """`rope_parameters` for the factors that Llama 3.1 and later files carry as a tensor; None without one.

        Raises
        ------
        CheckpointError : the factors are not those of that scheme.
        """
        if "rope_freqs.weight" not in self.tensors:
            return None
        factors = self.dequantized("rope_freqs.weight").double()
        factor = float(factors.max())
        if factor == 1.0 and bool((factors == 1.0).all()):
            return None
        wavelength = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        smooth = (LLAMA3_ORIGINAL / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
        smooth = smooth.clamp(0.0, 1.0)  # 0: scaled by the whole factor, 1: left alone
        want = 1.0 / ((1.0 - smooth) / factor + smooth)
        # 1e-4: the file's factors went through float32 powers; another scheme differs by far more.
        if factors.shape != want.shape or not torch.allclose(factors, want, rtol=1e-4, atol=0.0):
            raise CheckpointError(
                f"rope_freqs.weight in {self.path.name!r} (largest factor {factor:g}) is not the rotary scaling of "
                "Llama 3.1 and 3.2, the only one known here. Use the original checkpoint."
            )
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_ORIGINAL,
        }
