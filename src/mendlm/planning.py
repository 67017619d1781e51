"""Planning: which tensors of a checkpoint are compressed, how, and what that gives; every check is made here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mendlm.budgets import packed_bytes
from mendlm.checkpoints.header import FLOATING, safetensors_name, tensor_bytes, torch_name
from mendlm.checkpoints.plan import PlannedTensor, copied, natural_key
from mendlm.checkpoints.reader import Checkpoint
from mendlm.errors import MendError, located
from mendlm.families import choose_tensors
from mendlm.patterns import n_kept_total
from mendlm.refiners import check_rank
from mendlm.report.records import Totals, summarize

if TYPE_CHECKING:
    from mendlm.config import Recipe


@dataclass(frozen=True)
class CompressionPlan:
    """What `compress` would do.

    Attributes
    ----------
    model : the input folder.
    recipe : how.
    tensors : every tensor of the checkpoint, by shard, then by name (numbers in names by value).
    totals : over all tensors.
    """

    model: Path
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    totals: Totals

    @property
    def compressed(self) -> tuple[PlannedTensor, ...]:
        """The tensors to compress."""
        return tuple(tensor for tensor in self.tensors if tensor.action == "compress")

    @property
    def guard(self) -> PlannedTensor:
        """The first compressed tensor by shard and name, which leaves an empty tensor under its own name."""
        return min(self.compressed, key=lambda tensor: (tensor.shard, tensor.name))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "recipe": self.recipe.to_dict(),
            "totals": self.totals.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> CompressionPlan:
    """Plan every tensor of an open checkpoint.

    Raises
    ------
    UsageError : as `mendlm.pipeline.plan`.
    """
    shard_of = {name: shard for shard in checkpoint.shards for name in shard.header.by_name}
    names = sorted(shard_of, key=lambda name: (shard_of[name].name, natural_key(name)))
    infos = {name: shard_of[name].header.by_name[name] for name in names}
    candidates = [
        name
        for name, info in infos.items()
        if len(info.shape) == 2 and 0 not in info.shape and info.dtype in FLOATING and name.endswith(".weight")
    ]
    chosen = set(
        choose_tensors(checkpoint.model_type, candidates, names, include=recipe.include, exclude=recipe.exclude)
    )
    tensors: list[PlannedTensor] = []
    for name, info in infos.items():
        shard = shard_of[name].name
        if name not in chosen:
            tensors.append(copied(name, shard, info.shape, info.dtype, recipe.dtype))
            continue
        try:
            tensors.append(_plan_weight(name, shard, (info.shape[0], info.shape[1]), info.dtype, recipe))
        except MendError as err:
            raise located(err, f"{name} in {shard}") from err
    totals = summarize(
        (t.action == "compress", prod(t.shape, start=1), t.stored_params, t.dense_bytes, t.stored_bytes)
        for t in tensors
    )
    return CompressionPlan(checkpoint.folder, recipe, tuple(tensors), totals)


def _plan_weight(name: str, shard: str, shape: tuple[int, int], dtype: str, recipe: Recipe) -> PlannedTensor:
    rank = recipe.refiner_for(*shape, name=name).rank
    check_rank(rank, *shape)
    pattern = recipe.pattern_for(name)
    n_kept = n_kept_total(pattern, *shape)
    stored = dtype if recipe.dtype is None else safetensors_name(getattr(torch, recipe.dtype))
    return PlannedTensor(
        name=name,
        shard=shard,
        shape=shape,
        dtype=torch_name(dtype),
        storage_dtype=torch_name(stored),
        action="compress",
        n_kept=n_kept,
        rank=rank,
        dense_bytes=tensor_bytes(dtype, shape),
        stored_bytes=packed_bytes(*shape, n_kept, rank, tensor_bytes(stored, (1,))),
        pattern=pattern,
    )
