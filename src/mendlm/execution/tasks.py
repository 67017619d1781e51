"""One tensor as a task: what any process on any machine needs to compress it, and what it answers.

A tensor is always computed with one CPU thread. The number of threads changes the order of floating-point sums, and so
the bytes; with one for each tensor they depend neither on the number of workers nor on the machine's cores.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mendlm._memory import peak_memory_bytes, trim
from mendlm.checkpoints.header import read_header
from mendlm.checkpoints.plan import PlannedTensor
from mendlm.checkpoints.reader import Shard, as_bytes, read_weight
from mendlm.errors import CheckpointError, MendError, located
from mendlm.execution.tensor import compress_tensor
from mendlm.inputs import InputStats
from mendlm.linalg import OVERSAMPLING
from mendlm.report.records import TensorRecord

if TYPE_CHECKING:
    from mendlm.config import Recipe

N_THREADS = 1  # of the CPU, for each tensor

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
    """What is the same for all tensors of a run; it can be pickled.

    Attributes
    ----------
    recipe : how.
    shards : the files of the input by name, with absolute paths.
    devices : where to compute; workers are dealt to them in turn.
    """

    recipe: Recipe
    shards: Mapping[str, Shard] = field(repr=False)
    devices: tuple[torch.device, ...]


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
        raise located(err, f"{tensor.name} in {shard.name}") from err
    return Compressed(tensor, parts, record, time.monotonic() - started)


@dataclass(frozen=True)
class Answer:
    """What a worker in another process says of a tensor: how it went, or what went wrong."""

    record: TensorRecord | None
    parts: list[memoryview]
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int | None
    error: Exception | None = None


def answer(job: Job, tensor: PlannedTensor, device: torch.device) -> Answer:
    """Compress a tensor in a worker, with one thread; errors are part of the answer."""
    shard = job.shards[tensor.shard]
    try:
        with one_thread():
            _check_shard(shard.path, shard.header.sha256)
            done = compress_weight(shard, tensor, job.recipe, device)
    except Exception as err:  # noqa: BLE001 - the driver raises it
        return Answer(None, [], 0.0, 0, None, _portable(err))
    parts = [as_bytes(part) if part.numel() else memoryview(b"") for part in done.parts]
    on_cuda = device.type == "cuda"
    peak_device = torch.cuda.max_memory_allocated(device) if on_cuda else None
    trim()
    return Answer(done.record, parts, done.seconds, peak_memory_bytes(), peak_device)


def compressed(said: Answer, tensor: PlannedTensor | None, worker: str) -> Compressed:
    """What a worker's answer about a tensor comes to.

    Raises
    ------
    Exception : what went wrong there.
    """
    if said.error is not None:
        raise said.error
    if tensor is None or said.record is None:
        raise RuntimeError(f"{worker} answered without a record")
    parts = [torch.frombuffer(part, dtype=torch.uint8) if part.nbytes else _NOTHING for part in said.parts]
    peaks = (said.peak_memory_bytes, said.peak_device_bytes)
    return Compressed(tensor, parts, said.record, said.seconds, worker, *peaks)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def memory_bytes(tensor: PlannedTensor, recipe: Recipe) -> int:
    """What a process needs to compress a tensor on the CPU, itself included; an upper bound."""
    d_out, d_in = tensor.shape
    copies = _COPIES.get(str(recipe.refiner), _SVD_COPIES)
    if recipe.solver == "exact" or tensor.rank + OVERSAMPLING >= min(d_out, d_in):
        copies = max(copies, _SVD_COPIES)
    return _PROCESS_BYTES + copies * d_out * d_in * (8 if tensor.dtype == "float64" else 4)


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
