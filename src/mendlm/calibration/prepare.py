"""Everything a calibrated run needs before it starts: the text, the model's skeleton, sparsities by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mendlm._memory import trim
from mendlm.allocation import outlier_frac, owl_sparsities
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.matching import shared_frac, split_windows
from mendlm.calibration.walk import CalibrationText, Walk, modules_by_block
from mendlm.calibration.windows import Windows, windows_of
from mendlm.checkpoints.reader import Checkpoint, read_weight
from mendlm.errors import UsageError
from mendlm.patterns import NM

if TYPE_CHECKING:
    from mendlm.config import Matching
    from mendlm.planning import CompressionPlan

logger = logging.getLogger(__name__)

_SHARED = 0.05  # of what is held out may also be tuned on without a warning


@dataclass(frozen=True)
class Prepared:
    """What a calibrated run starts with.

    Attributes
    ----------
    model : the blocks, none of them loaded.
    text : what runs through them.
    facts : for `mendlm.json`: source, number and length of windows, SHA-256 of the token ids, warnings.
    """

    model: BlockModel
    text: CalibrationText
    facts: Mapping[str, Any]


def prepare(checkpoint: Checkpoint, plan: CompressionPlan, device: torch.device, folder: Path | None) -> Prepared:
    """Get the calibration text of a recipe as token windows, and the model's skeleton.

    Parameters
    ----------
    checkpoint : the dense model.
    plan : what will be done to it.
    device : where blocks run.
    folder : where to keep activations in a file; None keeps them in memory.

    Raises
    ------
    UsageError : no tokenizer, too little text, an architecture whose blocks cannot be found, a tensor to compress
        outside the blocks.
    MendError : text that cannot be fetched.
    CheckpointError : the model lacks a tensor.
    """
    calibration = plan.recipe.calibration
    if calibration is None:
        raise UsageError("the recipe has no calibration.")
    model = BlockModel(checkpoint, device, _run_dtype(plan, device))
    modules_by_block(model, plan.compressed)
    windows = windows_of(checkpoint, calibration, plan.recipe.seed, device)
    warnings = [*windows.warnings, *_overlap(windows, plan.recipe.match_blocks)]
    trim()
    facts = {
        "source": windows.source,
        "n_sequences": windows.ids.shape[0],
        "seqlen": windows.seqlen,
        "token_ids_sha256": windows.sha256,
        "warnings": warnings,
    }
    return Prepared(model, CalibrationText(windows.ids, calibration.batch_size, folder), facts)


def _overlap(windows: Windows, matching: Matching | None) -> list[str]:
    """A warning where windows that block matching holds out are of the text that it tunes on; it is logged, too."""
    if matching is None:
        return []
    share = shared_frac(windows.ids, split_windows(len(windows.ids), matching.held_out))
    if share <= _SHARED:
        return []
    warning = (
        f"{share:.0%} of the text that block matching holds out is in windows that it tunes on, so that it does not "
        "see what does harm on other text. Give more text, lower n_sequences, or take leading windows."
    )
    logger.warning("%s", warning)
    return [warning]


def survey(
    prepared: Prepared, checkpoint: Checkpoint, plan: CompressionPlan, tell: Callable[[int, str], None]
) -> dict[str, float]:
    """Sparsity of every tensor to compress, by the outliers of its block: one dense pass over the text.

    Raises
    ------
    UsageError : the pattern has a fixed sparsity.
    """
    owl, pattern = plan.recipe.layer_sparsity, plan.recipe.pattern
    if owl is None or isinstance(pattern, NM):
        raise UsageError(f"layer_sparsity needs an unstructured pattern, got {pattern}.")
    by_name = {tensor.name: tensor for tensor in plan.compressed}
    shards = {shard.name: shard for shard in checkpoint.shards}
    walk = Walk(prepared.model, prepared.text, tell)
    fracs: dict[int, float] = {}
    sizes: dict[int, int] = {}
    by_block = modules_by_block(prepared.model, plan.compressed)
    for index in range(max(by_block) + 1):
        modules = by_block.get(index, {})
        with prepared.model.loaded(index) as block:
            stats = walk.gather(index, block, modules, gram=False, advance=True, phase="survey")
        if not modules:
            continue
        n_outliers = 0.0
        for name in modules:
            tensor = by_name[name]
            W = read_weight(shards[tensor.shard], tensor).to(prepared.model.device)
            # An expert that no token reached would have no outliers at all, and its block more zeros.
            known = stats[name] if stats[name].n_tokens else stats[name].revived()
            n_outliers += outlier_frac(W, known.second_moment, owl.threshold) * W.numel()
            sizes[index] = sizes.get(index, 0) + W.numel()
        fracs[index] = n_outliers / sizes[index]
    chosen = owl_sparsities(fracs, sizes, pattern.sparsity, owl.spread)
    logger.info("sparsity by block: %s", {index: round(value, 4) for index, value in chosen.items()})
    return {name: chosen[index] for index, modules in by_block.items() for name in modules}


def _run_dtype(plan: CompressionPlan, device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; elsewhere the dtype of the weights."""
    calibration = plan.recipe.calibration
    if calibration is not None and calibration.dtype is not None:
        dtype: torch.dtype = getattr(torch, calibration.dtype)
    elif device.type == "cpu":
        dtype = torch.float32
    else:
        dtype = getattr(torch, plan.compressed[0].dtype)
    return dtype
