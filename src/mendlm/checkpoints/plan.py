"""The plan: what happens to every tensor, and with it the exact layout of every output file, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

from mendlm.budgets import factor_params
from mendlm.checkpoints.header import FLOATING, safetensors_name, tensor_bytes, torch_name
from mendlm.checkpoints.reader import Shard
from mendlm.checkpoints.writer import ShardLayout
from mendlm.errors import UsageError
from mendlm.patterns import Pattern

# The format as config.json names it, and the tensors that a compressed weight is stored as (docs/format.md).
METHOD, VERSION, LAYOUT = "mendlm", 1, "packed"
PARTS = VALUES, BITMASK, LORA_A, LORA_B = "weight_values", "weight_bitmask", "lora_A", "lora_B"
EXPORTED = ("semi-structured", "factored")  # layouts that `export` names there, so that no loader takes S for the model


def refuse_exported(layout: object, what: str) -> None:
    """Raise `UsageError` if the layout of `what` is one that `export` writes and nothing here reads."""
    if layout in EXPORTED:
        raise UsageError(
            f"{what} is an export in the layout {layout!r}, which only programs of your own read. Give the folder that "
            "it was exported from."
        )


def packed_shapes(d_out: int, d_in: int, n_kept: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a compressed weight is stored as, by their names and in the order of `PARTS`."""
    return {VALUES: (n_kept,), BITMASK: (d_out, -(-d_in // 8)), LORA_A: (rank, d_in), LORA_B: (d_out, rank)}


@dataclass(frozen=True)
class PlannedTensor:
    """What happens to one tensor.

    Attributes
    ----------
    name, shard, shape : which tensor, in which file; for "compress" the shape is (d_out, d_in), however it is stored.
    dtype, storage_dtype : before and after, e.g. "float32"; dtypes that are only copied have their safetensors names.
    action : "compress" or "copy".
    n_kept, rank : entries kept of S and rank of L; for "copy" the number of entries and 0.
    pattern : where the zeros of S may be; None for "copy".
    dense_bytes, stored_bytes : data before and after.
    source : its name in the input; another one only for an expert that is a slice of a 3-D tensor.
    index : which slice of the 3-D `source` it is; None if it is all of it.
    transposed : whether the input has it as (d_in, d_out).
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str
    storage_dtype: str
    action: Literal["compress", "copy"]
    n_kept: int
    rank: int
    dense_bytes: int
    stored_bytes: int
    pattern: Pattern | None = None
    source: str = ""
    index: int | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            object.__setattr__(self, "source", self.name)

    @property
    def module(self) -> str:
        """Path of the module whose weight this is."""
        return self.name.removesuffix(".weight")

    @property
    def stored_params(self) -> int:
        """Entries stored: kept values and factors, or all."""
        if self.action == "copy":
            return self.n_kept
        d_out, d_in = self.shape
        return self.n_kept + factor_params(d_out, d_in, self.rank)

    def parts(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order in which their bytes are written and checked."""
        if self.action == "copy":
            return (self.name,)
        return tuple(f"{self.module}.{part}" for part in PARTS)

    def layout(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of the stored tensors."""
        stored = _stored_dtype(self.storage_dtype)
        if self.action == "copy":
            return [(self.name, stored, self.shape)]
        d_out, d_in = self.shape
        shapes = packed_shapes(d_out, d_in, self.n_kept, self.rank).values()
        dtypes = (stored, "U8", stored, stored)
        return list(zip(self.parts(), dtypes, shapes, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        pattern = None if self.pattern is None else str(self.pattern)
        return asdict(self) | {"shape": list(self.shape), "pattern": pattern}


def copied(name: str, shard: str, shape: tuple[int, ...], dtype: str, storage_dtype: str | None) -> PlannedTensor:
    """Plan to copy a tensor of safetensors dtype `dtype`; if it is floating, as `storage_dtype` (a torch name)."""
    stored = dtype if storage_dtype is None or dtype not in FLOATING else _stored_dtype(storage_dtype)
    return PlannedTensor(
        name=name,
        shard=shard,
        shape=shape,
        dtype=torch_name(dtype),
        storage_dtype=torch_name(stored),
        action="copy",
        n_kept=prod(shape),
        rank=0,
        dense_bytes=tensor_bytes(dtype, shape),
        stored_bytes=tensor_bytes(stored, shape),
    )


def shard_layout(shard: Shard, tensors: Iterable[PlannedTensor], guard: PlannedTensor) -> ShardLayout:
    """Layout of the output file for `shard`.

    The guard, the checkpoint's first compressed tensor, also leaves an empty tensor under the name that it has in the
    input: transformers without mendlm then stops at a shape that does not fit, where it would otherwise hand out random
    weights. (Experts that it would have stacked cannot be, and a stacked tensor does not fit either.)
    """
    planned = [tensor for tensor in tensors if tensor.shard == shard.name]
    entries = [entry for tensor in planned for entry in tensor.layout()]
    if guard.shard == shard.name:
        entries.append((guard.source, _stored_dtype(guard.storage_dtype), (0,)))
    return ShardLayout(shard.name, entries, {"format": "pt"} | dict(shard.header.metadata))


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def _stored_dtype(name: str) -> str:
    """The safetensors name of a dtype of a plan."""
    by_name = {torch_name(dtype): safetensors_name(torch_dtype) for dtype, torch_dtype in FLOATING.items()}
    return by_name.get(name, name)
