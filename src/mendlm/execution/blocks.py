"""Calibrated work: block by block, with the statistics that the calibration text gives at every linear input."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mendlm._memory import trim
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.matching import Match, PackedWeight, State, batch_sizes, match_block, split_windows
from mendlm.calibration.walk import CalibrationText, Walk, modules_by_block
from mendlm.checkpoints.journal import Entry
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Shard, as_bytes, read_tensor, read_weight
from mendlm.checkpoints.writer import ShardWriter
from mendlm.errors import NonFiniteError
from mendlm.execution.run import BlockStarted, Run
from mendlm.execution.tasks import Compressed
from mendlm.execution.tensor import dense_weight, remeasured, tensor_generator
from mendlm.inputs import InputStats
from mendlm.report.records import BlockRecord

if TYPE_CHECKING:
    from mendlm.config import Matching

logger = logging.getLogger(__name__)

Stored = dict[str, list[Tensor]]  # tensor name -> its parts, or the tensor itself if it is stored dense


class BlockRun(Run):
    """Walk the model once: gather, compress, propagate, block by block; with block matching, match before that.

    A run that is resumed sends the text again through the blocks that are done, with the weights that are on the disk:
    the same bits as without the interruption. With matching a block counts as done when all of it is.

    Parameters
    ----------
    run : the arguments of `Run`.
    model, text : the blocks, and what runs through them.
    """

    def __init__(self, *run: Any, model: BlockModel, text: CalibrationText) -> None:
        super().__init__(*run)
        self._model, self._text = model, text
        self._matching = self.plan.recipe.match_blocks
        self._by_block = modules_by_block(model, self.plan.compressed)
        self._by_name = {tensor.name: tensor for tensor in self.plan.tensors}
        # What matching changes beside the compressed weights: block -> name in the block -> tensor.
        self._vectors: dict[int, dict[str, PlannedTensor]] = {}
        if self._matching is not None:
            split_windows(text.ids.shape[0], self._matching.held_out)
            for index, modules in self._by_block.items():
                names = model.vectors(index, {path for path, _ in modules.values()})
                self._vectors[index] = {path: self._by_name[name] for path, name in names.items()}

    def execute(self) -> None:
        """Write every tensor that is not done yet; errors as `Run.execute`."""
        self._find_matched()
        later = {tensor.name for vectors in self._vectors.values() for tensor in vectors.values()}
        with ExitStack() as stack:
            writers = {
                shard.name: stack.enter_context(ShardWriter(self.staging.files, self.layouts[shard.name]))
                for shard in self.shards
            }
            for shard in self.shards:
                for tensor in self._tensors(shard):
                    if tensor.action == "copy" and tensor.name not in self._done and tensor.name not in later:
                        self._copy(writers[shard.name], shard, tensor)
            if any(self._pending(index) for index in self._by_block):
                self._walk(writers)
            self._sync(writers.values())

    def _walk(self, writers: Mapping[str, ShardWriter]) -> None:
        model, calibration = self._model, self.plan.recipe.calibration
        last = max(index for index in self._by_block if self._pending(index))  # nothing after it needs inputs
        walk = Walk(model, self._text, self._tell_block, dense_stream=self._matching is not None)
        if self._matching is not None:
            walk.learn_batches(batch_sizes(self._text.ids.shape[0], self._matching))
        dense = calibration is not None and calibration.propagate == "dense"
        for index in range(last + 1):
            with model.loaded(index) as block:
                stored = self._do_block(walk, index, block, writers, advance=dense)
                if index == last or (dense and stored):
                    continue
                if self._matching is not None and not stored:
                    walk.propagate_dense(index, block)
                if not dense:
                    self._replace(index, block, stored, writers)
                walk.propagate(index, block)

    def _do_block(
        self, walk: Walk, index: int, block: nn.Module, writers: Mapping[str, ShardWriter], *, advance: bool
    ) -> Stored:
        """Compress what is not done of a block; the parts stored, by tensor name."""
        pending = self._pending(index)
        if not pending:
            return {}
        modules = self._by_block[index]
        stats = walk.gather(index, block, modules, gram=self.plan.recipe.needs == "gram", advance=advance)
        shards = {shard.name: shard for shard in self.shards}
        if self._matching is None:
            # What is derived of statistics is several times their size, and goes with the last weight that needs it.
            stored = {
                tensor.name: self._compress(writers[tensor.shard], shards[tensor.shard], tensor, stats.pop(tensor.name))
                for tensor in pending
            }
        else:
            done = [
                self._compute(shards[tensor.shard], tensor, stats[tensor.name], n_waiting=n)
                for n, tensor in enumerate(pending)
            ]
            started = time.monotonic()
            match = self._match(walk, index, block, done, self._matching)
            stored = self._write_matched(index, done, match, stats, writers)
            self._note_block(index, match, self._matching, time.monotonic() - started)
        for name in {tensor.shard for tensor in self._tensors_of(index)}:
            writers[name].sync()
        self.staging.journal.sync()
        del stats
        trim()
        return stored

    def _match(self, walk: Walk, index: int, block: nn.Module, done: list[Compressed], matching: Matching) -> Match:
        """Tune a block that is compressed and, as `block` is still dense, move the dense stream on."""
        shards = {shard.name: shard for shard in self.shards}
        weights = {}
        for one in done:
            values, bitmask, A, B = one.parts
            path, d_in = self._by_block[index][one.tensor.name]
            weights[path] = PackedWeight((values, bitmask, A, B), d_in, one.tensor.transposed)
        vectors = {path: _read_vector(shards[t.shard], t) for path, t in self._vectors[index].items()}
        targets = walk.propagate_dense(index, block)
        self._tell_block(index, "match")
        return match_block(
            block,
            partial(self._model.forward, index),
            State(weights, vectors),
            walk.states,
            targets,
            matching,
            device=self._model.device,
            dtype=self._model.dtype,
            generator=tensor_generator(self.plan.recipe.seed, _entry_name(index)),
        )

    def _write_matched(
        self,
        index: int,
        done: list[Compressed],
        match: Match,
        stats: Mapping[str, InputStats],
        writers: Mapping[str, ShardWriter],
    ) -> Stored:
        """Write all of a block; what was written, by tensor name."""
        shards = {shard.name: shard for shard in self.shards}
        stored: Stored = {}
        for one in done:
            name, shard = one.tensor.name, one.tensor.shard
            parts = list(match.state.weights[self._by_block[index][name][0]].parts)
            W = read_weight(shards[shard], one.tensor)
            record = remeasured(one.record, W, parts, self.plan.recipe, self.device, stats[name])
            self._write(writers[shard], replace(one, parts=parts, record=record))
            stored[name] = parts
        for path, tensor in self._vectors[index].items():
            vector = match.state.vectors[path]
            self._note(tensor, writers[tensor.shard].write(tensor.name, [as_bytes(vector)]), None, 0.0)
            stored[tensor.name] = [vector]
        return stored

    def _note_block(self, index: int, match: Match, matching: Matching, seconds: float) -> None:
        """Put a block that is matched and written into the journal."""
        n_sequences = self._text.ids.shape[0]
        n_windows = split_windows(n_sequences, matching.held_out)
        record = BlockRecord(
            block=index,
            status="improved" if match.best_step else "kept",
            loss_before=match.loss_before,
            loss_after=match.loss_after,
            n_steps=match.n_steps,
            best_step=match.best_step,
            vectors=tuple(tensor.name for tensor in self._vectors[index].values()) if match.best_step else (),
            n_windows=n_windows,
            n_held_out=n_sequences - n_windows,
        )
        entry = Entry(_entry_name(index), 0, record.to_dict(), seconds)
        self.staging.journal.add(entry)
        self._block_entries[index] = entry
        logger.info(
            "block %d: %s, loss %.4g, was %.4g, step %d of %d, %.1f s",
            *(index, record.status, record.loss_after, record.loss_before, record.best_step, record.n_steps, seconds),
        )

    def _find_matched(self) -> None:
        """Find the blocks that an earlier run has matched; what it has of others is done again."""
        for index in self._vectors:
            entry = self.staging.journal.entries.get(_entry_name(index))
            tensors = self._tensors_of(index)
            if entry is not None and all(tensor.name in self._done for tensor in tensors):
                self._block_entries[index] = entry
                continue
            for tensor in tensors:
                if tensor.name in self._done:
                    self._forget(tensor)

    def _tensors_of(self, index: int) -> list[PlannedTensor]:
        """What is written when a block is done."""
        compressed = [self._by_name[name] for name in self._by_block.get(index, {})]
        return compressed + list(self._vectors.get(index, {}).values())

    def _pending(self, index: int) -> list[PlannedTensor]:
        """The tensors of a block that are to be compressed and not done."""
        names = self._by_block.get(index, {})
        return [tensor for tensor in self.plan.compressed if tensor.name in names and tensor.name not in self._done]

    def _replace(self, index: int, block: nn.Module, stored: Stored, writers: Mapping[str, ShardWriter]) -> None:
        """Give the block at work what is stored of it: from `stored`, else from the disk."""

        def parts_of(tensor: PlannedTensor) -> list[Tensor]:
            if tensor.name in stored:
                return stored[tensor.name]
            return [writers[tensor.shard].read(name) for name in tensor.parts()]

        for name, (path, _) in self._by_block.get(index, {}).items():
            _replace_weight(block.get_submodule(path), parts_of(self._by_name[name]), self._by_name[name], self._model)
        for path, tensor in self._vectors.get(index, {}).items():
            block.get_parameter(path).data.copy_(parts_of(tensor)[0])

    def _tell_block(self, index: int, phase: str) -> None:
        self._tell(BlockStarted(index + 1, self._model.n_blocks, phase))


def _read_vector(shard: Shard, tensor: PlannedTensor) -> Tensor:
    """A norm or bias in its storage dtype."""
    vector = read_tensor(shard, shard.header.by_name[tensor.name])
    stored = vector.to(getattr(torch, tensor.storage_dtype))
    if bool((stored.isinf() & vector.isfinite()).any()):
        raise NonFiniteError(
            f"a value overflows {tensor.storage_dtype}. Store in bfloat16 or float32. [{tensor.name} in {shard.name}]"
        )
    return stored


def _entry_name(index: int) -> str:
    """What a block is called in the journal."""
    return f"matching of block {index}"


def _replace_weight(module: nn.Module, parts: list[Tensor], tensor: PlannedTensor, model: BlockModel) -> None:
    """Give a module of the block at work the weight that was stored for it."""
    weight: Any = module.weight
    dense = dense_weight([part.to(model.device) for part in parts], tensor.shape[1], model.dtype)
    weight.data.copy_(dense.T if tensor.transposed else dense)
