"""Calibrated work: block by block, with the statistics that the calibration text gives at every linear input."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from mendlm._memory import trim
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.walk import CalibrationText, Walk, modules_by_block
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.writer import ShardWriter
from mendlm.execution.run import BlockStarted, Run
from mendlm.execution.tensor import dense_weight


class BlockRun(Run):
    """Walk the model once: gather, compress, propagate, block by block.

    A run that is resumed sends the text again through the blocks that are done, with the weights that are on the disk:
    the same bits as without the interruption.

    Parameters
    ----------
    run : the arguments of `Run`.
    model, text : the blocks, and what runs through them.
    """

    def __init__(self, *run: Any, model: BlockModel, text: CalibrationText) -> None:
        super().__init__(*run)
        self._model, self._text = model, text

    def execute(self) -> None:
        """Write every tensor that is not done yet; errors as `Run.execute`."""
        with ExitStack() as stack:
            writers = {
                shard.name: stack.enter_context(ShardWriter(self.staging.files, self.layouts[shard.name]))
                for shard in self.shards
            }
            for shard in self.shards:
                for tensor in self._tensors(shard):
                    if tensor.action == "copy" and tensor.name not in self._done:
                        self._copy(writers[shard.name], shard, tensor)
            if any(tensor.name not in self._done for tensor in self.plan.compressed):
                self._walk(writers)
            for writer in writers.values():
                writer.sync()
            self.staging.journal.sync()

    def _walk(self, writers: Mapping[str, ShardWriter]) -> None:
        model, calibration = self._model, self.plan.recipe.calibration
        by_name = {tensor.name: tensor for tensor in self.plan.compressed}
        by_block = modules_by_block(model, self.plan)
        last = max(
            index for index, names in by_block.items() if any(name not in self._done for name in names)
        )  # nothing after it needs inputs
        walk = Walk(model, self._text, self._tell_block)
        dense = calibration is not None and calibration.propagate == "dense"
        for index in range(last + 1):
            with model.loaded(index) as block:
                stored = self._do_block(walk, index, block, by_block.get(index, {}), writers, advance=dense)
                if index == last or (dense and stored):
                    continue
                if not dense:
                    for name, (path, _) in by_block.get(index, {}).items():
                        parts = stored[name] if name in stored else self._stored(writers, by_name[name])
                        _replace_weight(block.get_submodule(path), parts, by_name[name], model)
                walk.propagate(index, block)

    def _do_block(
        self,
        walk: Walk,
        index: int,
        block: nn.Module,
        modules: Mapping[str, tuple[str, int]],
        writers: Mapping[str, ShardWriter],
        *,
        advance: bool,
    ) -> dict[str, list[Tensor]]:
        """Compress what is not done of a block; the parts stored, by tensor name."""
        pending = [t for t in self.plan.compressed if t.name in modules and t.name not in self._done]
        if not pending:
            return {}
        stats = walk.gather(index, block, modules, gram=self.plan.recipe.needs == "gram", advance=advance)
        shards = {shard.name: shard for shard in self.shards}
        stored = {}
        for tensor in pending:
            stored[tensor.name] = self._compress(
                writers[tensor.shard], shards[tensor.shard], tensor, stats[tensor.name]
            )
        for name in {tensor.shard for tensor in pending}:
            writers[name].sync()
        self.staging.journal.sync()
        del stats
        trim()
        return stored

    def _stored(self, writers: Mapping[str, ShardWriter], tensor: PlannedTensor) -> list[Tensor]:
        """The parts of a tensor that is done, from the disk."""
        writer = writers[tensor.shard]
        return [writer.read(name) for name in tensor.parts()]

    def _tell_block(self, index: int, phase: str) -> None:
        self._tell(BlockStarted(index + 1, self._model.n_blocks, phase))


def _replace_weight(module: nn.Module, parts: list[Tensor], tensor: PlannedTensor, model: BlockModel) -> None:
    """Give a module of the block at work the weight that was stored for it."""
    weight: Any = module.weight
    dense = dense_weight([part.to(model.device) for part in parts], tensor.shape[1], model.dtype)
    weight.data.copy_(dense.T if tensor.transposed else dense)
