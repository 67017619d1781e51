"""A task, one tensor or several of one shape: what a process on any machine needs for it, and what it answers.

A tensor is always computed with one CPU thread. The number of threads changes the order of floating-point sums, and so
the bytes; with one for each tensor they depend neither on the number of workers nor on the machine's cores.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mendlm._memory import peak_memory_bytes, trim
from mendlm.checkpoints.header import read_header
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Shard, as_bytes, read_weight
from mendlm.criteria import CRITERIA, AbstractCriterion
from mendlm.errors import CheckpointError, MendError, located
from mendlm.execution.tensor import compress_stack, compress_tensor
from mendlm.inputs import InputStats
from mendlm.linalg import OVERSAMPLING
from mendlm.refiners import REFINERS, AbstractRefiner, StackRefiner
from mendlm.report.records import TensorRecord

if TYPE_CHECKING:
    from mendlm.config import Recipe

logger = logging.getLogger(__name__)

N_THREADS = 1  # of the CPU, for each tensor

Task = tuple[PlannedTensor, ...]
Method = type[AbstractCriterion] | type[AbstractRefiner]

# On CUDA matrices of one shape are refined together, as a launch costs more than what it computes: 11.6 times faster
# for 576 x 1536, 2.2 for 2048 x 2048, less for larger ones (docs/scaling.md). On a CPU it is slower than one after the
# other. Entries of a matrix and of a task, at most.
STACKED_ENTRIES, TASK_ENTRIES = 2**22, 2**25

# Largest resident memory of a process that compresses a tensor: Python and torch, and copies of the tensor in its
# compute dtype. Measured on 1 thread (docs/executors.md): 0.25 GB, and 4 to 6 copies with the subspace solver or
# without a low-rank part; 10 to 13.5 with full SVDs, 21 for robust PCA.
_PROCESS_BYTES = 300_000_000
_COPIES = {"none": 7, "tlr": 7, "accelerated-tlr": 7, "pcp": 22}
_SVD_COPIES = 14


@dataclass(frozen=True)
class Compressed:
    """A tensor that is compressed and not yet written.

    Attributes
    ----------
    tensor : which one.
    parts : in the order of the plan, on the CPU; from another process flat uint8 tensors of the same bytes.
    record : what was done.
    seconds : that it took.
    worker : of which worker it comes; empty for this process.
    peak_memory_bytes, peak_device_bytes : of the worker so far.
    """

    tensor: PlannedTensor
    parts: list[Tensor]
    record: TensorRecord
    seconds: float
    worker: str = ""
    peak_memory_bytes: int = 0
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Job:
    """What is the same for all tasks of a run; it can be pickled.

    Attributes
    ----------
    recipe : how.
    shards : the files of the input by name, with absolute paths.
    devices : where to compute; workers are dealt to them in turn.
    methods : names and classes of the recipe's criteria and refiner that are not mendlm's, which another process does
        not know by their names.
    """

    recipe: Recipe
    shards: Mapping[str, Shard] = field(repr=False)
    devices: tuple[torch.device, ...]
    methods: tuple[tuple[str, Method], ...] = ()


def own_methods(recipe: Recipe) -> tuple[tuple[str, Method], ...]:
    """Names and classes of the criteria and the refiner of a recipe that are not mendlm's."""
    names = {recipe.criterion, *(o.criterion for o in recipe.overrides if o.criterion is not None)}
    methods: list[tuple[str, Method]] = [(name, CRITERIA[name]) for name in sorted(names)]
    if isinstance(recipe.refiner, str):
        methods.append((recipe.refiner, REFINERS[recipe.refiner]))
    else:
        methods.append((recipe.refiner.name, type(recipe.refiner)))
    return tuple((name, kind) for name, kind in methods if kind.__module__.partition(".")[0] != "mendlm")


def place(task: Task) -> str:
    """Where a task is in the checkpoint, for an error."""
    more = f" and {len(task) - 1} more" if len(task) > 1 else ""
    return f"{task[0].name}{more} in {task[0].shard}"


def as_tasks(tensors: Iterable[PlannedTensor], recipe: Recipe, device: torch.device) -> list[Task]:
    """Tensors in groups that are compressed together, on the CPU each alone; in the order of the first of each.

    Which tensors are together depends on nothing but these arguments, and so then do the bytes: sums of a stack may
    have another order than those of one matrix.
    """
    tasks: list[list[PlannedTensor]] = []
    open_tasks: dict[Any, list[PlannedTensor]] = {}
    for tensor in tensors:
        key = _stack_key(tensor, recipe) if device.type == "cuda" else None
        task = open_tasks.get(key)
        if key is None or task is None or (len(task) + 1) * prod(tensor.shape) > TASK_ENTRIES:
            task = []
            tasks.append(task)
            open_tasks[key] = task
        task.append(tensor)
    return [tuple(task) for task in tasks]


def _stack_key(tensor: PlannedTensor, recipe: Recipe) -> Any:
    """What tensors must have in common to be refined together; None: this one is alone."""
    d_out, d_in = tensor.shape
    if d_out * d_in > STACKED_ENTRIES or recipe.metric_kind != "plain":
        return None
    refiner = recipe.refiner_for(d_out, d_in, tensor.name)
    if not isinstance(refiner, StackRefiner) or not refiner.stacks(d_out, d_in):
        return None
    return tensor.shape, tensor.dtype, tensor.storage_dtype, refiner


def compress_weight(
    shard: Shard, tensor: PlannedTensor, recipe: Recipe, device: torch.device, inputs: InputStats | None = None
) -> Compressed:
    """Read a weight and compress it.

    Raises
    ------
    NonFiniteError, UsageError, CheckpointError : it cannot be compressed, or not be read; the message names it.
    """
    started = time.monotonic()
    try:
        W = read_weight(shard, tensor)
        parts, record = compress_tensor(W, tensor, recipe, device, inputs)
    except MendError as err:
        raise located(err, place((tensor,))) from err
    return Compressed(tensor, parts, record, time.monotonic() - started)


def compress_task(job: Job, task: Task, device: torch.device) -> list[Compressed]:
    """Compress the tensors of a task; errors as `compress_weight`."""
    if len(task) > 1:
        started = time.monotonic()
        try:
            weights = [read_weight(job.shards[tensor.shard], tensor) for tensor in task]
            found = compress_stack(weights, task, job.recipe, device)
        except MendError:
            logger.info("%d tensors cannot be compressed together; the one at fault is looked for", len(task))
        else:
            seconds = (time.monotonic() - started) / len(task)
            return [Compressed(tensor, *one, seconds) for tensor, one in zip(task, found, strict=True)]
    return [compress_weight(job.shards[tensor.shard], tensor, job.recipe, device) for tensor in task]


@dataclass(frozen=True)
class Answer:
    """What a worker in another process says of a task: how it went, or what went wrong.

    Attributes
    ----------
    records, seconds : of each tensor.
    parts : of all tensors, those of the first before those of the second.
    peak_memory_bytes, peak_device_bytes : of the process so far.
    """

    records: list[TensorRecord]
    parts: list[memoryview]
    seconds: list[float]
    peak_memory_bytes: int
    peak_device_bytes: int | None
    error: Exception | None = None


def failure(err: Exception) -> Answer:
    """The answer that something went wrong."""
    return Answer([], [], [], 0, None, err)


def answer(job: Job, task: Task, device: torch.device) -> Answer:
    """Compress the tensors of a task in a worker, with one thread; errors are part of the answer."""
    try:
        for name, kind in job.methods:
            if issubclass(kind, AbstractRefiner):
                REFINERS[name] = kind
            else:
                CRITERIA[name] = kind
        with one_thread():
            for name in {tensor.shard for tensor in task}:
                _check_shard(job.shards[name].path, job.shards[name].header.sha256)
            done = compress_task(job, task, device)
    except Exception as err:  # noqa: BLE001 - the driver raises it
        return failure(_portable(err))
    parts = [as_bytes(part) if part.numel() else memoryview(b"") for one in done for part in one.parts]
    on_cuda = device.type == "cuda"
    peak_device = torch.cuda.max_memory_allocated(device) if on_cuda else None
    trim()
    records, seconds = [one.record for one in done], [one.seconds for one in done]
    return Answer(records, parts, seconds, peak_memory_bytes(), peak_device)


def compressed(said: Answer, task: Task, worker: str) -> Iterator[Compressed]:
    """What a worker's answer about a task comes to, tensor by tensor.

    Raises
    ------
    Exception : what went wrong there.
    """
    if said.error is not None:
        raise said.error
    parts = [torch.frombuffer(part, dtype=torch.uint8) if part.nbytes else _NOTHING for part in said.parts]
    peaks = (said.peak_memory_bytes, said.peak_device_bytes)
    each = iter(parts)
    for tensor, record, seconds in zip(task, said.records, said.seconds, strict=True):
        mine = [next(each) for _ in tensor.parts()]
        yield Compressed(tensor, mine, record, seconds, worker, *peaks)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def memory_bytes(task: Task, recipe: Recipe) -> int:
    """What a process needs to compress the tensors of a task on the CPU, itself included; an upper bound."""
    needed = _PROCESS_BYTES
    for tensor in task:
        d_out, d_in = tensor.shape
        copies = _COPIES.get(str(recipe.refiner), _SVD_COPIES)
        if recipe.solver == "exact" or tensor.rank + OVERSAMPLING >= min(d_out, d_in):
            copies = max(copies, _SVD_COPIES)
        needed += copies * d_out * d_in * (8 if tensor.dtype == "float64" else 4)
    return needed


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with `N_THREADS` threads for a while."""
    before = torch.get_num_threads()
    if before == N_THREADS:
        yield
        return
    torch.set_num_threads(N_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _check_shard(path: Path, sha256: str) -> None:
    """Check, once in a process, that it sees the file that the plan was made from."""
    try:
        seen = read_header(path).sha256
    except CheckpointError as err:
        if path.exists():
            raise
        raise CheckpointError(
            f"{str(path)!r} is not there on the machine {platform.node()!r}. "
            "MODEL must be on a file system that all machines share, at the same path."
        ) from err
    if seen != sha256:
        raise CheckpointError(
            f"{str(path)!r} on the machine {platform.node()!r} is another file than the one that was planned. "
            "All machines must see the same MODEL, and nothing may change it meanwhile."
        )


def _portable(err: Exception) -> Exception:
    """An error that can be pickled."""
    import pickle

    try:
        pickle.loads(pickle.dumps(err))
    except Exception:  # noqa: BLE001 - whatever its class does
        return RuntimeError(f"{type(err).__name__}: {err}")
    return err
