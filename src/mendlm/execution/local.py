"""Work on one machine: tensors one after the other in this process, or in worker processes beside it.

Processes and not threads: one that dies or hangs costs only its tensor, and small tensors do not wait for one another's
turn in the interpreter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from multiprocessing.connection import Connection, Pipe, wait
from typing import ClassVar

import torch

from mendlm._memory import available_memory_bytes
from mendlm._processes import ended
from mendlm.devices import resolve_devices
from mendlm.errors import UsageError
from mendlm.execution._base import AbstractExecutor, Pool, Started, Tries, check_settings
from mendlm.execution._worker import END
from mendlm.execution.tasks import Answer, Compressed, Job, Task, compress_task, compressed, memory_bytes, one_thread
from mendlm.refiners import AbstractRefiner

logger = logging.getLogger(__name__)

SMALL_ENTRIES = 2**23  # with fewer entries in all, this process is done before others have started

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from mendlm.execution._worker import main
main(*map(int, sys.argv[2:]))
"""


@dataclass(frozen=True)
class LocalExecutor(AbstractExecutor):
    """Processes of this machine.

    Parameters
    ----------
    workers : how many. By default one for each CUDA device; on the CPU one for each thread that torch would take
        (OMP_NUM_THREADS or the cores) while memory lasts; for little work, and for a method that they could not import,
        none beside this process.
    task_timeout : seconds for a tensor, after which its worker is ended and the tensor done again; None waits for ever.
    """

    name: ClassVar[str] = "local"

    workers: int | None = None
    task_timeout: float | None = None

    def __post_init__(self) -> None:
        check_settings(self.workers, self.task_timeout)

    def devices(self, name: str) -> tuple[torch.device, ...]:
        """The devices of ``cpu``, ``cuda``, ``cuda:1`` or ``cuda:0,1``; errors as `resolve_devices`."""
        devices = resolve_devices(name)
        if self.workers is not None and self.workers < len(devices):
            raise UsageError(f"{self.workers} workers for {len(devices)} devices: name fewer, or take more workers.")
        return devices

    @contextlib.contextmanager
    def open(self, job: Job, tasks: Sequence[Task]) -> Iterator[Pool]:
        """Workers for a job; with one, and no limit of time, this process does the work.

        Raises
        ------
        UsageError : they cannot import a method of the recipe.
        """
        n_workers = self._n_workers(job, tasks)
        if (n_workers > 1 or self.task_timeout is not None) and (stuck := _only_here(job)):
            raise UsageError(
                f"{stuck} is defined in the program that was started, where worker processes cannot import it. Put its "
                "class into a module, or take 1 worker, 1 device and no task timeout."
            )
        if n_workers == 1 and self.task_timeout is None:
            with one_thread():
                yield _Here(job)
        else:
            with _Processes(job, n_workers, self.task_timeout) as pool:
                yield pool

    def _n_workers(self, job: Job, tasks: Sequence[Task]) -> int:
        if self.workers is not None:
            return min(self.workers, len(tasks))
        if job.devices[0].type != "cpu":
            return min(len(job.devices), len(tasks))
        if _only_here(job):
            return 1
        if sum(prod(tensor.shape) for task in tasks for tensor in task) < SMALL_ENTRIES:
            return 1
        largest = max(memory_bytes(task, job.recipe) for task in tasks)
        room = available_memory_bytes() // largest
        n_threads = min(torch.get_num_threads(), len(tasks))
        if room < n_threads:
            logger.info("memory for %d workers of %d bytes, where %d could work", max(room, 1), largest, n_threads)
        return max(1, min(room, n_threads))


def _only_here(job: Job) -> str:
    """A method of the recipe, with its name, that no other process can import; "" if there is none."""
    stuck = (
        f"{'refiner' if issubclass(kind, AbstractRefiner) else 'criterion'} {name!r}"
        for name, kind in job.methods
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__
    )
    return next(stuck, "")


class _Here(Pool):
    """No workers: this process, one task after the other. The reference for every other pool."""

    n_workers = 1

    def __init__(self, job: Job) -> None:
        self._job = job

    def compress(self, tasks: Sequence[Task], started: Started) -> Iterator[Compressed]:
        """Compress the tensors of one task after the other; errors as `Pool.compress`."""
        for task in tasks:
            started(task)
            yield from compress_task(self._job, task, self._job.devices[0])


class _Worker:
    """A worker process and the task that it is at."""

    def __init__(self, slot: int, job: bytes) -> None:
        self.slot = slot
        self.task: Task | None = None
        self.deadline = float("inf")
        self.timed_out = False
        self._stderr = tempfile.TemporaryFile()
        self.pipe, theirs = Pipe()
        with theirs:
            fds = (theirs.fileno(), os.getpid())
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal sends Ctrl-C to the driver's group
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # no pool of threads to start and then leave alone
            )
        self._send(job)

    def give(self, task: Task, timeout: float | None) -> None:
        """Let it work on a task; `timeout` is for each of its tensors."""
        self.task = task
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout * len(task)
        self._send(pickle.dumps(task))

    def take(self) -> Answer:
        """The answer that is waiting in the pipe.

        Raises
        ------
        EOFError, ConnectionError : it died.
        """
        said, sizes = pickle.loads(self.pipe.recv_bytes())
        parts = [memoryview(bytearray(size)) for size in sizes]
        for part in parts:
            if part.nbytes:
                self.pipe.recv_bytes_into(part)
        self.task, self.deadline = None, float("inf")
        answer: Answer = replace(said, parts=parts)
        return answer

    def end(self) -> None:
        """Let it go when it has nothing to do."""
        self._send(END)

    def kill(self) -> str:
        """End the process if it has not ended; how it ended, as a sentence."""
        self.pipe.close()
        self._process.kill()
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace")
        self._stderr.close()
        return ended(code, said)

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: the next look at the pipe finds it
            self.pipe.send_bytes(message)


class _Processes(Pool):
    """Worker processes. Each holds one result until it is taken, so that no more wait than there are workers."""

    def __init__(self, job: Job, n_workers: int, timeout: float | None) -> None:
        self.n_workers = n_workers
        self._timeout = timeout
        self._jobs = [pickle.dumps((job, device)) for device in job.devices]
        self._workers: list[_Worker] = []

    def __enter__(self) -> _Processes:
        try:
            for slot in range(self.n_workers):
                self._start(slot)
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()

    def compress(self, tasks: Sequence[Task], started: Started) -> Iterator[Compressed]:
        """Compress the tensors of `tasks` on all workers; errors as `Pool.compress`."""
        queue, told, tries = deque(tasks), set[str](), Tries()

        def feed(worker: _Worker) -> None:
            if not queue:
                return
            task = queue.popleft()
            worker.give(task, self._timeout)
            if task[0].name not in told:  # and not one that is tried again
                told.add(task[0].name)
                started(task)

        while queue or any(worker.task is not None for worker in self._workers):
            for worker in self._workers:
                if worker.task is None:
                    feed(worker)
            for worker, task in self._ready():
                try:
                    if worker.timed_out:
                        raise TimeoutError
                    said = worker.take()
                except (EOFError, ConnectionError, TimeoutError):
                    self._replace(worker, task, tries)
                    queue.appendleft(task)
                    continue
                feed(worker)  # before its result is written, so that it does not wait for the disk
                yield from compressed(said, task, f"process {worker.slot}")
        for worker in self._workers:
            worker.end()

    def _ready(self) -> list[tuple[_Worker, Task]]:
        """The workers at work that have something to say, died, or are out of time; waits until there is one."""
        busy = {worker.pipe: (worker, worker.task) for worker in self._workers if worker.task is not None}
        while True:
            now = time.monotonic()
            late = [(worker, task) for worker, task in busy.values() if worker.deadline <= now]
            for worker, _ in late:
                worker.timed_out = True
            if late:
                return late
            left = min(worker.deadline for worker, _ in busy.values()) - now
            found = wait(list(busy), None if left == float("inf") else left)
            if found:
                return [busy[pipe] for pipe in found if isinstance(pipe, Connection)]

    def _replace(self, worker: _Worker, task: Task, tries: Tries) -> None:
        """Put a new worker in the place of one that died or hung at `task`.

        Raises
        ------
        WorkerError : that task has had its tries.
        """
        how = worker.kill()
        if worker.timed_out:
            how = f"it took longer than the task timeout of {self._timeout:g} s."
        self._workers.remove(worker)
        tries.failed(task, how, _advice(how))
        self._start(worker.slot)

    def _start(self, slot: int) -> None:
        self._workers.append(_Worker(slot, self._jobs[slot % len(self._jobs)]))

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()


def _advice(how: str) -> str:
    if "timeout" in how:
        return "Give it more time with --task-timeout."
    return "Take fewer workers if memory is short; leave the tensor out with --exclude if it is at fault."
