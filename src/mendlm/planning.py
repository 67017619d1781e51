"""Planning: which tensors of a checkpoint are compressed, how, and what that gives; every check is made here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mendlm.budgets import packed_bytes
from mendlm.checkpoints.header import FLOATING, TensorInfo, safetensors_name, tensor_bytes, torch_name
from mendlm.checkpoints.plan import PlannedTensor, copied, natural_key
from mendlm.checkpoints.reader import Checkpoint
from mendlm.errors import MendError, UsageError, located
from mendlm.families import block_of, can_be_compressed, choose_tensors, expert_name, is_transposed
from mendlm.names import literal_name
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
    tensors : every tensor of the checkpoint, by shard, then by name (numbers in names by value); a 3-D tensor of
        experts that is compressed is one for each expert.
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
        """The first compressed tensor by shard and name; it leaves an empty tensor under its name in the input."""
        first = min(self.compressed, key=lambda tensor: (tensor.shard, tensor.name))
        return replace(first, name=first.source)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {
            "recipe": self.recipe.to_dict(),
            "totals": self.totals.to_dict(),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, sparsities: Mapping[str, float] | None = None) -> CompressionPlan:
    """Plan every tensor of an open checkpoint.

    Parameters
    ----------
    checkpoint : dense.
    recipe : how.
    sparsities : tensor name -> sparsity in place of the recipe's pattern's, for tensors that have one.

    Raises
    ------
    UsageError : as `mendlm.pipeline.plan`.
    """
    shard_of = {name: shard for shard in checkpoint.shards for name in shard.header.by_name}
    names = sorted(shard_of, key=lambda name: (shard_of[name].name, natural_key(name)))
    infos = {name: shard_of[name].header.by_name[name] for name in names}
    chosen = _choose(checkpoint, infos, recipe)
    tensors: list[PlannedTensor] = []
    for name, info in infos.items():
        shard = shard_of[name].name
        if name not in chosen:
            tensors.append(copied(name, shard, info.shape, info.dtype, recipe.dtype))
            continue
        try:
            tensors.extend(_plan_weights(checkpoint.model_type, shard, info, recipe, sparsities or {}))
        except MendError as err:
            raise located(err, f"{name} in {shard}") from err
    _check_overrides(recipe, {*infos, *(tensor.name for tensor in tensors)})
    totals = summarize(
        (t.action == "compress", prod(t.shape, start=1), t.stored_params, t.dense_bytes, t.stored_bytes)
        for t in tensors
    )
    return CompressionPlan(checkpoint.folder, recipe, tuple(tensors), totals)


def _check_overrides(recipe: Recipe, names: Collection[str]) -> None:
    """Refuse an override for one tensor that is none of these; a glob may match nothing."""
    for override in recipe.overrides:
        name = literal_name(override.match)
        if name is not None and name not in names:
            raise UsageError(
                f"override {override.match!r} is of a tensor that the model does not have, so the recipe is of another "
                "model. Make one for this model with mendlm plan, or give a glob."
            )


def _choose(checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], recipe: Recipe) -> set[str]:
    """Names of the tensors to compress."""
    model_type, config = checkpoint.model_type, checkpoint.config
    of_text = config.get("text_config")  # of a model that sees, too
    tied = config.get("tie_word_embeddings", of_text.get("tie_word_embeddings") if isinstance(of_text, dict) else None)
    candidates = [
        name
        for name, info in infos.items()
        if 0 not in info.shape and can_be_compressed(model_type, name, len(info.shape))
    ]
    chosen = choose_tensors(
        model_type, candidates, tuple(infos), include=recipe.include, exclude=recipe.exclude, tied=tied is True
    )
    for name in chosen:
        if infos[name].dtype not in FLOATING:
            raise UsageError(
                f"{name!r} has dtype {infos[name].dtype}, and mendlm compresses {', '.join(FLOATING)}. Give the model "
                f"before quantization, or add --exclude {name!r}."
            )
    if not recipe.skip_layers:
        return set(chosen)
    skipped = _skipped_blocks(model_type, infos, recipe.skip_layers)
    left = {name for name in chosen if block_of(name, model_type) not in skipped}
    if not left:
        raise UsageError(f"skip_layers {list(recipe.skip_layers)} leaves no tensor to compress. Skip fewer layers.")
    return left


def _skipped_blocks(model_type: str | None, names: Collection[str], skip_layers: Collection[int]) -> set[int]:
    """Indices of the blocks to skip; negative numbers count from the last block."""
    blocks = {block for name in names if (block := block_of(name, model_type)) is not None}
    if not blocks:
        raise UsageError(
            f"skip_layers {list(skip_layers)}: no tensor's name says in which layer it is, as in 'layers.0.'. "
            "Leave tensors out with --exclude."
        )
    n_blocks = 1 + max(blocks)
    for layer in skip_layers:
        if not -n_blocks <= layer < n_blocks:
            raise UsageError(
                f"skip_layers {layer}: the model has {n_blocks} layers, 0 to {n_blocks - 1}, or -{n_blocks} to -1 "
                "counted from the end."
            )
    return {layer % n_blocks for layer in skip_layers}


def _plan_weights(
    model_type: str | None, shard: str, info: TensorInfo, recipe: Recipe, sparsities: Mapping[str, float]
) -> Iterator[PlannedTensor]:
    """One matrix, or one for each expert of a 3-D tensor."""
    transposed = is_transposed(model_type, info.name)
    d_out, d_in = info.shape[:-3:-1] if transposed else info.shape[-2:]
    if len(info.shape) == 2:
        places: list[tuple[str, int | None]] = [(info.name, None)]
    else:
        places = [(expert_name(info.name, index), index) for index in range(info.shape[0])]
    for name, index in places:
        planned = _plan_weight(name, shard, (d_out, d_in), info.dtype, recipe, sparsities.get(name))
        yield replace(planned, source=info.name, index=index, transposed=transposed)


def _plan_weight(
    name: str, shard: str, shape: tuple[int, int], dtype: str, recipe: Recipe, sparsity: float | None
) -> PlannedTensor:
    rank = recipe.refiner_for(*shape, name=name).rank
    check_rank(rank, *shape)
    pattern = recipe.pattern_for(name, sparsity)
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
