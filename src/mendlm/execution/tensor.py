"""The work on one tensor: mask, refine, pack, and the record of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mendlm.budgets import sparsity_of
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.criteria import Selection
from mendlm.decomposition import merge
from mendlm.errors import UsageError
from mendlm.inputs import InputStats, treat_dead_columns
from mendlm.linalg import compute_dtype
from mendlm.masks import row_blocks
from mendlm.metrics import Metric, make_metric, ratio
from mendlm.packing import pack_mask, unpack
from mendlm.patterns import Pattern
from mendlm.refiners import Refinement, StackRefiner, refine, refine_stack
from mendlm.report.records import TensorRecord
from mendlm.selection import select

if TYPE_CHECKING:
    from mendlm.config import Recipe


def compress_tensor(
    W: Tensor, tensor: PlannedTensor, recipe: Recipe, device: torch.device, inputs: InputStats | None = None
) -> tuple[list[Tensor], TensorRecord]:
    """Compress one weight.

    Parameters
    ----------
    W : (d_out, d_in), a floating CPU tensor.
    tensor : its plan.
    recipe : how.
    device : where to compute.
    inputs : what calibration says about its inputs, if the recipe needs it.

    Returns
    -------
    parts : values, bitmask, A and B on the CPU, in the order of `PlannedTensor.parts`.
    record : what was done.

    Raises
    ------
    UsageError, NonFiniteError : as `select` and `refine`, or dead inputs; they do not name the tensor.
    """
    W = W.to(device)
    generator = tensor_generator(recipe.seed, tensor.name, device)
    refiner = recipe.refiner_for(W.shape[0], W.shape[1], tensor.name)
    used, stats = (W, None) if inputs is None else treat_dead_columns(W, inputs, recipe.dead_columns)
    with torch.no_grad():
        selection = _select(used, tensor, recipe, generator, stats)
        metric = _metric(recipe, stats, W)
        out = refine(
            used,
            selection.mask,
            refiner,
            metric=metric,
            start=selection.S,
            pattern=_pattern(tensor, recipe),
            inputs=stats,
            storage_dtype=getattr(torch, tensor.storage_dtype),
            generator=generator,
        )
        return _packed(out, tensor, recipe, selection, inputs)


def compress_stack(
    weights: Sequence[Tensor], tensors: Sequence[PlannedTensor], recipe: Recipe, device: torch.device
) -> list[tuple[list[Tensor], TensorRecord]]:
    """`compress_tensor` of weights of one shape, dtype and rank, without calibration, the steps of all at once.

    Raises
    ------
    UsageError, NonFiniteError : for any of them.
    """
    first, (d_out, d_in) = tensors[0], weights[0].shape
    refiner = recipe.refiner_for(d_out, d_in, first.name)
    if not isinstance(refiner, StackRefiner):
        raise UsageError(f"refiner {refiner.name!r} works on one matrix at a time.")
    with torch.no_grad():
        on_device = [W.to(device) for W in weights]
        generators = [tensor_generator(recipe.seed, tensor.name, device) for tensor in tensors]
        rows = zip(on_device, tensors, generators, strict=True)
        selections = [_select(W, tensor, recipe, generator, None) for W, tensor, generator in rows]
        found = refine_stack(
            on_device,
            [selection.mask for selection in selections],
            refiner,
            storage_dtype=getattr(torch, first.storage_dtype),
            generators=generators,
        )
        results = zip(found, tensors, selections, strict=True)
        return [_packed(out, tensor, recipe, selection, None) for out, tensor, selection in results]


def _pattern(tensor: PlannedTensor, recipe: Recipe) -> Pattern:
    return recipe.pattern if tensor.pattern is None else tensor.pattern


def _select(
    W: Tensor, tensor: PlannedTensor, recipe: Recipe, generator: torch.Generator, stats: InputStats | None
) -> Selection:
    pattern = _pattern(tensor, recipe)
    return select(W, recipe.criterion_for(tensor.name), pattern, inputs=stats, generator=generator)


def _packed(
    out: Refinement, tensor: PlannedTensor, recipe: Recipe, selection: Selection, inputs: InputStats | None
) -> tuple[list[Tensor], TensorRecord]:
    """What is stored of a refinement, and its record."""
    mask = out.decomposition.mask
    d_out, d_in = mask.shape
    # By blocks: an index is two int64 for every kept entry.
    values = torch.cat([S[kept] for S, kept in row_blocks(out.S, mask)])
    parts = [on_cpu(part) for part in (values, pack_mask(mask), out.A, out.B)]
    record = TensorRecord(
        name=tensor.name,
        shard=tensor.shard,
        shape=(d_out, d_in),
        dtype=tensor.dtype,
        storage_dtype=tensor.storage_dtype,
        criterion=recipe.criterion_for(tensor.name).name,
        n_kept=parts[0].numel(),
        sparsity=sparsity_of(parts[0].numel(), d_out, d_in),
        rank=parts[2].shape[0],
        n_iter=len(out.trace),
        status=out.status,
        objective=out.objective,
        rel_error=out.rel_error,
        energy_frac=out.trace[-1].energy_frac if out.trace else None,
        dense_bytes=tensor.dense_bytes,
        stored_bytes=sum(part.nbytes for part in parts),
        metric=out.metric,
        damping=selection.damping if out.damping is None else out.damping,
        rel_output_error=out.rel_output_error,
        n_tokens=None if inputs is None else inputs.n_tokens,
        n_dead=None if inputs is None else int(inputs.dead.sum()),
    )
    return parts, record


def on_cpu(x: Tensor) -> Tensor:
    """`x` in memory of the CPU, contiguous."""
    x = x.contiguous()
    if not x.is_cuda:
        return x
    # Pinned memory is kept by torch for the next tensor; a copy into fresh pages took 27 ms for 34 MB instead of 1.
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def remeasured(
    record: TensorRecord,
    W: Tensor,
    parts: list[Tensor],
    recipe: Recipe,
    device: torch.device,
    inputs: InputStats | None = None,
) -> TensorRecord:
    """The record of a weight whose `parts` were changed since: what is stored has other errors.

    Parameters are those of `compress_tensor`.
    """
    W = W.to(device)
    used, stats = (W, None) if inputs is None else treat_dead_columns(W, inputs, recipe.dead_columns)
    compute = compute_dtype(W.dtype)
    metric, dense = _metric(recipe, stats, W), used.to(compute)
    error = dense - dense_weight([part.to(device) for part in parts], W.shape[1], compute)
    return dataclasses.replace(
        record,
        rel_error=ratio(float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(dense))),
        rel_output_error=None if metric.name == "plain" else ratio(metric.norm(error), metric.norm(dense)),
    )


def _metric(recipe: Recipe, stats: InputStats | None, W: Tensor) -> Metric:
    dtype = compute_dtype(W.dtype)
    return make_metric(recipe.metric_kind, stats, damping=recipe.damping, dtype=dtype, device=W.device)


def dense_weight(parts: list[Tensor], d_in: int, dtype: torch.dtype) -> Tensor:
    """The weight (d_out, d_in) that the stored parts stand for, merged as the merged runtime does."""
    values, bitmask, A, B = parts
    return merge(unpack(values, bitmask, d_in), B, A, dtype)


def tensor_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of randomness for one tensor: the same for a seed and a name, whatever was done before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
