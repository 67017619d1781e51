"""The table of a checkpoint's tensors, from headers and records alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from mendlm.budgets import factor_params, sparsity_of
from mendlm.checkpoints.folder import Packed, Part, open_folder
from mendlm.checkpoints.header import tensor_bytes, torch_name
from mendlm.checkpoints.plan import natural_key
from mendlm.paths import local_path
from mendlm.report.records import MANIFEST_FILE, TensorRecord, Totals, read_manifest, summarize


@dataclass(frozen=True)
class InspectedTensor:
    """One weight of the model, as it is stored.

    Attributes
    ----------
    name, shard, shape, dtype : of the weight; `dtype` is the one stored, e.g. "bfloat16".
    action : "compress" for a weight stored as S, B and A, "copy" for one that is stored as it was.
    n_kept, sparsity, rank : of a compressed weight, from the headers; None for others.
    rel_error, energy_frac : from the records of the run; None where there are none.
    dense_bytes, stored_bytes : data of the weight in `dtype`, dense and as it is stored.
    """

    name: str
    shard: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["compress", "copy"]
    n_kept: int | None
    sparsity: float | None
    rank: int | None
    rel_error: float | None
    energy_frac: float | None
    dense_bytes: int
    stored_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Inspection:
    """A whole checkpoint.

    Attributes
    ----------
    path : the folder.
    layout : "dense", or "packed" if mendlm compressed it.
    model_type : of config.json.
    tensors : sorted by name, numbers in names by value.
    totals : over all tensors; `dense_bytes` in the dtypes stored.
    recipe : how it was compressed, None for a dense folder or one without records.
    """

    path: Path
    layout: Literal["dense", "packed"]
    model_type: str | None
    tensors: tuple[InspectedTensor, ...]
    totals: Totals
    recipe: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "model_type": self.model_type,
            "recipe": None if self.recipe is None else dict(self.recipe),
            "totals": self.totals.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def inspect(path: str | Path) -> Inspection:
    """List the weights of a checkpoint folder, dense or compressed, without reading one of them.

    Parameters
    ----------
    path : a folder with safetensors files.

    Raises
    ------
    UsageError : no checkpoint there, or one that is neither dense nor mendlm's.
    CheckpointError : a file is missing or damaged.

    Notes
    -----
    Reads config.json, the index, the headers and `mendlm.json` if there is one: time and memory grow with the number of
    tensors, not with their size.
    """
    path = local_path(path)
    folder = open_folder(path)
    has_records = folder.layout == "packed" and (path / MANIFEST_FILE).is_file()
    manifest = read_manifest(path) if has_records else None
    records = {record.name: record for record in manifest.records} if manifest else {}
    rows = [_compressed_row(name, packed, records.get(name)) for name, packed in folder.packed.items()]
    rows += [_copied_row(name, part) for name, part in folder.copied.items()]
    rows.sort(key=lambda row: natural_key(row.name))
    totals = summarize(
        (r.action == "compress", prod(r.shape), _stored_params(r), r.dense_bytes, r.stored_bytes) for r in rows
    )
    model_type = folder.config.get("model_type")
    return Inspection(
        path=path,
        layout=folder.layout,
        model_type=model_type if isinstance(model_type, str) else None,
        tensors=tuple(rows),
        totals=totals,
        recipe=manifest.recipe if manifest else None,
    )


def _compressed_row(name: str, packed: Packed, record: TensorRecord | None) -> InspectedTensor:
    dtype = packed.values.info.dtype
    return InspectedTensor(
        name=name,
        shard=packed.values.shard.name,
        shape=packed.shape,
        dtype=torch_name(dtype),
        action="compress",
        n_kept=packed.n_kept,
        sparsity=sparsity_of(packed.n_kept, *packed.shape),
        rank=packed.rank,
        rel_error=record.rel_error if record else None,
        energy_frac=record.energy_frac if record else None,
        dense_bytes=tensor_bytes(dtype, packed.shape),
        stored_bytes=packed.n_bytes,
    )


def _copied_row(name: str, part: Part) -> InspectedTensor:
    return InspectedTensor(
        name=name,
        shard=part.shard.name,
        shape=part.info.shape,
        dtype=torch_name(part.info.dtype),
        action="copy",
        n_kept=None,
        sparsity=None,
        rank=None,
        rel_error=None,
        energy_frac=None,
        dense_bytes=part.info.n_bytes,
        stored_bytes=part.info.n_bytes,
    )


def _stored_params(row: InspectedTensor) -> int:
    if row.n_kept is None or row.rank is None:
        return prod(row.shape)
    return row.n_kept + factor_params(row.shape[0], row.shape[1], row.rank)
