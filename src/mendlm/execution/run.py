"""The work of one run on its staging folder, whatever the order in which it is done."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mendlm._memory import peak_memory_bytes
from mendlm.checkpoints.header import FLOATING, TensorInfo
from mendlm.checkpoints.journal import Entry
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Shard, as_bytes, read_chunks
from mendlm.checkpoints.staging import Staging
from mendlm.checkpoints.writer import ShardLayout, ShardWriter
from mendlm.errors import NonFiniteError
from mendlm.execution.tasks import Compressed, compress_weight
from mendlm.inputs import InputStats
from mendlm.planning import CompressionPlan
from mendlm.report.records import BlockRecord, TensorRecord

logger = logging.getLogger(__name__)

_CONVERTED_CHUNK_BYTES = 2**20  # the conversion and its check take several times that


@dataclass(frozen=True)
class TensorStarted:
    """Work on a tensor begins.

    Attributes
    ----------
    name, shard : which tensor, in which file.
    index, n_tensors : the how-manieth (from 1) of the tensors to compress, in all; resumed ones count as done before.
    done_bytes, total_bytes : dense bytes of the tensors done so far, and of all tensors to compress.
    """

    name: str
    shard: str
    index: int
    n_tensors: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class TensorDone:
    """A tensor is written and in the journal.

    Attributes
    ----------
    record : what was done.
    index, n_tensors, done_bytes, total_bytes : as in `TensorStarted`, this tensor included.
    seconds : that it took.
    """

    record: TensorRecord
    index: int
    n_tensors: int
    done_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True)
class BlockStarted:
    """A block is about to run over the calibration text.

    Attributes
    ----------
    index, n_blocks : the how-manieth (from 1) of all blocks.
    phase : "gather" (statistics), "propagate" (its outputs are what the next block gets), "dense" (the same of the
        original model, where that is followed too), "match" (what is stored is tuned) or "survey" (a pass before the
        work, for sparsities by block).
    """

    index: int
    n_blocks: int
    phase: str


Event = TensorStarted | TensorDone | BlockStarted


class Run(ABC):
    """What every way to carry out a plan shares; a subclass says in which order in `execute`.

    Parameters
    ----------
    plan : what to do.
    shards : the files of the input.
    layouts : of the output files, by name.
    staging : where to write; what its journal holds, and the disk confirms, is not done again.
    device : where to compute.
    on_event : called with every `Event`.

    Attributes
    ----------
    n_done, n_resumed : compressed tensors that are written, and how many of them by an earlier run.
    n_workers, n_threads : processes at work, and CPU threads of each; None is torch's choice.
    """

    n_threads: int | None = None

    def __init__(
        self,
        plan: CompressionPlan,
        shards: tuple[Shard, ...],
        layouts: Mapping[str, ShardLayout],
        staging: Staging,
        device: torch.device,
        on_event: Callable[[Event], None] | None,
    ):
        self.plan = plan
        self.staging = staging
        self.shards = shards
        self.layouts = layouts
        self.device = device
        self._on_event = on_event
        self._total_bytes = sum(tensor.dense_bytes for tensor in plan.compressed)
        self._n_tensors = len(plan.compressed)
        self._done: dict[str, Entry] = {}
        self._block_entries: dict[int, Entry] = {}  # of the blocks that are matched and written
        self._done_bytes = 0
        self.n_done = 0
        self.n_resumed = 0
        self.n_workers = 1
        self._peaks: dict[str, tuple[int, int]] = {}  # of workers in other processes: memory, device memory

    def allocate(self) -> None:
        """Give every output file its size and header, and check what an earlier run has written.

        Raises
        ------
        StorageError : the disk is full, or cannot be written.
        """
        for shard in self.shards:
            with ShardWriter(self.staging.files, self.layouts[shard.name]) as writer:
                if not writer.allocate():
                    continue
                for tensor in self._tensors(shard):
                    entry = self.staging.journal.entries.get(tensor.name)
                    if entry is not None and writer.checksum(tensor.parts()) == entry.crc32:
                        self._count(tensor, entry)
                        self.n_resumed += tensor.action == "compress"
        if self.n_resumed:
            logger.info("%d of %d tensors were done by an earlier run", self.n_resumed, self._n_tensors)

    @abstractmethod
    def execute(self) -> None:
        """Write every tensor that is not done yet.

        Raises
        ------
        NonFiniteError, UsageError, CheckpointError : a tensor cannot be compressed; the message names it.
        StorageError : the disk is full, or cannot be written.
        """

    def records(self) -> tuple[TensorRecord, ...]:
        """The records of the compressed tensors, in the order of the plan."""
        rows = (self._done[tensor.name].record for tensor in self.plan.compressed)
        return tuple(TensorRecord.from_dict(row) for row in rows if row is not None)

    def block_records(self) -> tuple[BlockRecord, ...]:
        """The records of the blocks that were matched, in their order."""
        rows = (entry.record for entry in self._block_entries.values() if entry.record is not None)
        return tuple(sorted((BlockRecord.from_dict(row) for row in rows), key=lambda record: record.block))

    def seconds(self) -> dict[str, float]:
        """Name -> seconds of every compressed tensor."""
        return {tensor.name: self._done[tensor.name].seconds for tensor in self.plan.compressed}

    def peak_memory_bytes(self) -> int:
        """Largest resident memory of this process and of its workers on this machine; pages they share count often."""
        return peak_memory_bytes() + sum(memory for memory, _ in self._peaks.values())

    def peak_device_bytes(self) -> int | None:
        """Largest memory taken of one CUDA device; None on the CPU."""
        if self.device.type != "cuda":
            return None
        here = torch.cuda.max_memory_allocated(self.device) if self.n_workers == 1 and not self._peaks else 0
        return max([here, *(device for _, device in self._peaks.values())])

    def _sync(self, writers: Iterable[ShardWriter]) -> None:
        """Wait until everything written is on the disk."""
        for writer in writers:
            writer.sync()
        self.staging.journal.sync()

    def _tensors(self, shard: Shard) -> Iterator[PlannedTensor]:
        return (tensor for tensor in self.plan.tensors if tensor.shard == shard.name)

    def _copy(self, writer: ShardWriter, shard: Shard, tensor: PlannedTensor) -> None:
        """Copy a tensor that stays dense."""
        chunks = _copied_chunks(shard, shard.header.by_name[tensor.name], tensor)
        self._note(tensor, writer.write(tensor.name, chunks), None, 0.0)

    def _compress(
        self, writer: ShardWriter, shard: Shard, tensor: PlannedTensor, inputs: InputStats | None = None
    ) -> list[Tensor]:
        """Compress a tensor and write its parts, which are returned."""
        done = self._compute(shard, tensor, inputs)
        self._write(writer, done)
        return done.parts

    def _compute(
        self, shard: Shard, tensor: PlannedTensor, inputs: InputStats | None = None, *, n_waiting: int = 0
    ) -> Compressed:
        """Compress a tensor; `n_waiting` others are compressed and not written yet."""
        self._started(tensor, self.n_done + n_waiting + 1)
        return compress_weight(shard, tensor, self.plan.recipe, self.device, inputs)

    def _started(self, tensor: PlannedTensor, index: int) -> None:
        """Tell that work on the `index`-th tensor begins."""
        self._tell(
            TensorStarted(tensor.name, tensor.shard, index, self._n_tensors, self._done_bytes, self._total_bytes)
        )

    def _write(self, writer: ShardWriter, done: Compressed) -> None:
        """Write the parts of a tensor and note it in the journal."""
        tensor, record = done.tensor, done.record
        started = time.monotonic()
        crc32 = 0
        for name, part in zip(tensor.parts(), done.parts, strict=True):
            crc32 = writer.write(name, [as_bytes(part)] if part.numel() else [], crc32)
        if done.worker:
            self._peaks[done.worker] = (done.peak_memory_bytes, done.peak_device_bytes or 0)
        seconds = done.seconds + time.monotonic() - started
        self._note(tensor, crc32, record, seconds)
        logger.info(
            "%s: kept %d, rank %d, rel_error %.4g, %.2f s",
            *(record.name, record.n_kept, record.rank, record.rel_error, seconds),
        )
        n_done = self.n_done
        self._tell(TensorDone(record, n_done, self._n_tensors, self._done_bytes, self._total_bytes, seconds))

    def _note(self, tensor: PlannedTensor, crc32: int, record: TensorRecord | None, seconds: float) -> None:
        entry = Entry(tensor.name, crc32, None if record is None else record.to_dict(), round(seconds, 4))
        self.staging.journal.add(entry)
        self._count(tensor, entry)

    def _count(self, tensor: PlannedTensor, entry: Entry) -> None:
        self._done[tensor.name] = entry
        if tensor.action == "compress":
            self.n_done += 1
            self._done_bytes += tensor.dense_bytes

    def _forget(self, tensor: PlannedTensor) -> None:
        """Do again what an earlier run has done."""
        del self._done[tensor.name]
        if tensor.action == "compress":
            self.n_done -= 1
            self.n_resumed -= 1
            self._done_bytes -= tensor.dense_bytes

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)


def _copied_chunks(shard: Shard, info: TensorInfo, tensor: PlannedTensor) -> Iterator[memoryview]:
    """The bytes of a tensor that is not compressed, converted to its storage dtype if that is another one."""
    if tensor.dtype == tensor.storage_dtype:
        yield from read_chunks(shard, info)
        return
    target = getattr(torch, tensor.storage_dtype)
    for chunk in read_chunks(shard, info, _CONVERTED_CHUNK_BYTES):
        values = torch.frombuffer(chunk, dtype=FLOATING[info.dtype])
        converted = values.to(target)
        if bool((converted.isinf() & values.isfinite()).any()):
            raise NonFiniteError(
                f"a value overflows {tensor.storage_dtype}. Store in bfloat16 or float32. [{info.name} in {shard.name}]"
            )
        yield as_bytes(converted)
