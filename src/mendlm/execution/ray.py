"""Work on a Ray cluster: every task on whichever machine has room.

The tasks answer with bytes, as the workers of the local executor do; the driver alone writes. Ray is told not to repeat
anything: a task whose process or machine is lost is submitted again here, where its tries are counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

import mendlm
from mendlm.errors import MissingDependencyError, UsageError, WorkerError, located
from mendlm.execution._base import AbstractExecutor, Pool, Started, Tries, check_settings
from mendlm.execution.tasks import Answer, Compressed, Job, Task, answer, compressed, failure, memory_bytes, place

logger = logging.getLogger(__name__)

_N_QUEUED = 2  # tasks beyond those that can run, so that no machine waits for the driver
_LOOK_SECONDS = 5.0  # how often the cluster is asked what it has: machines come and go
_CONNECT_SECONDS = 10.0  # for a host to accept a connection
_ADDRESS = re.compile(r"auto|local|\[?[\w.:-]+\]?:\d{1,5}", re.ASCII)


@dataclass(frozen=True)
class RayExecutor(AbstractExecutor):
    """The machines of a Ray cluster. They must see the input at the same path, and have the same versions.

    Parameters
    ----------
    ray_address : "auto" is the cluster that this machine is part of (or RAY_ADDRESS), "HOST:PORT" the one with that
        head, "local" one of this machine alone that lives as long as the run. In a process that is connected to a
        cluster already, "auto" is that one.
    workers : tasks worked on at once; by default one for each CPU, or GPU, of the cluster.
    task_timeout : seconds for a tensor, after which the process on it is ended and the tensor done again.
    """

    name: ClassVar[str] = "ray"

    ray_address: str = "auto"
    workers: int | None = None
    task_timeout: float | None = None

    def __post_init__(self) -> None:
        check_settings(self.workers, self.task_timeout)
        if not _ADDRESS.fullmatch(self.ray_address):
            raise UsageError(f"ray_address must be 'auto', 'local' or 'HOST:PORT', got {self.ray_address!r}.")

    def devices(self, name: str) -> tuple[torch.device, ...]:
        """The device ``cpu`` or ``cuda``: Ray deals the GPUs.

        Raises
        ------
        MissingDependencyError : Ray is not installed (``pip install 'mendlm[ray]'``).
        UsageError : another name, or nobody listens at the address.
        """
        if name not in ("cpu", "cuda"):
            raise UsageError(f"device {name!r} does not go with the executor 'ray', which deals the GPUs: use 'cuda'.")
        _import_ray()
        address = os.environ.get("RAY_ADDRESS", "auto") if self.ray_address == "auto" else self.ray_address
        if re.fullmatch(r".*:\d+", address) and "://" not in address:
            _check_listens(address)
        return (torch.device(name),)

    @contextlib.contextmanager
    def open(self, job: Job, tasks: Sequence[Task]) -> Iterator[Pool]:
        """Connect to the cluster, and leave it as it was found.

        Raises
        ------
        WorkerError : there is none, or none with a GPU for the job.
        """
        with _connected(self.ray_address, self.workers):
            pool = _Tasks(job, self.workers, self.task_timeout)
            try:
                yield pool
            finally:
                pool.cancel()


class _Tasks(Pool):
    """Tasks of a cluster that this process is connected to; a few more are in flight than can run."""

    def __init__(self, job: Job, workers: int | None, timeout: float | None) -> None:
        ray = _import_ray()
        self._ray = ray
        self._job = job
        self._workers = workers
        self._timeout = timeout
        self._unit = "GPU" if job.devices[0].type == "cuda" else "CPU"
        # max_calls 0: a process goes on to the next task also where it holds a GPU.
        self._task = ray.remote(num_cpus=1, num_gpus=int(self._unit == "GPU"), max_calls=0, max_retries=0)(_work)
        self._job_ref = ray.put(job)
        self._versions = _versions()
        self._in_flight: dict[Any, tuple[Task, int]] = {}  # reference -> task, bytes asked for
        self._looked = -float("inf")
        self._units, self._room = 0, 0
        self._look()
        if self._units == 0 and self._unit == "GPU":
            raise WorkerError("no machine of the Ray cluster has a GPU. Use device 'cpu', or join one that has.")
        self.n_workers = min(workers or self._units, self._units) or 1

    def compress(self, tasks: Sequence[Task], started: Started) -> Iterator[Compressed]:
        """Compress tensors on the cluster; errors as `Pool.compress`, and `WorkerError` if its machines differ."""
        queue, tries = deque(tasks), Tries()
        n_begun = 0
        while queue or self._in_flight:
            while queue and len(self._in_flight) < self._limit():
                task = queue.popleft()
                self._submit(task, again=False)
                n_begun += 1
                started(task)
            ready, _ = self._ray.wait(list(self._in_flight), num_returns=1, timeout=_LOOK_SECONDS)
            if not ready:
                self._make_fit()
                continue
            task, _ = self._in_flight.pop(ready[0])
            done = self._take(ready[0], task, tries)
            if done is None:
                self._submit(task, again=True)
            else:
                yield from done

    def cancel(self) -> None:
        """End whatever is in flight."""
        for reference in self._in_flight:
            with contextlib.suppress(Exception):  # the cluster may be what has failed
                self._ray.cancel(reference, force=True)
        self._in_flight.clear()

    def _limit(self) -> int:
        """How many tasks may be in flight: running, waiting, or finished and not taken."""
        self._look()
        return self._workers or max(self._units, 1) + _N_QUEUED

    def _look(self) -> None:
        """Ask what the machines have, if that was not done just now."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        able = [
            node["Resources"]
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and node["Resources"].get(self._unit, 0) >= 1
        ]
        self._units = sum(int(resources[self._unit]) for resources in able)
        self._room = max((int(resources.get("memory", 0)) for resources in able), default=0)
        self._looked = time.monotonic()

    def _submit(self, task: Task, *, again: bool) -> None:
        """Hand a task to Ray, which is told of its memory, or of all that the largest machine has if that is less."""
        need = memory_bytes(task, self._job.recipe)
        self._look()
        if self._room and need > self._room:
            logger.warning(
                "%s may need %d bytes of memory; no machine offers more than %d", place(task), need, self._room
            )
            need = self._room
        where = {"scheduling_strategy": "SPREAD"} if again else {}  # away from the machine where it failed
        remote = self._task.options(memory=need, name=f"mendlm {task[0].name}", **where)
        reference = remote.remote(self._job_ref, task, self._timeout, self._versions)
        self._in_flight[reference] = (task, need)

    def _make_fit(self) -> None:
        """Submit again what asks for more memory than any machine has that is left."""
        self._look()
        if not self._units:
            logger.warning("no machine of the Ray cluster has a free %s: waiting for one", self._unit)
        for reference, (task, need) in list(self._in_flight.items()):
            if self._room and need > self._room:
                self._ray.cancel(reference, force=True)
                del self._in_flight[reference]
                self._submit(task, again=True)

    def _take(self, reference: Any, task: Task, tries: Tries) -> Iterator[Compressed] | None:
        """What came of a task; None if it is to be tried again.

        Raises
        ------
        WorkerError : it has had its tries, or the machine cannot do it.
        MendError : what is wrong with a tensor, when the first result is asked for.
        """
        errors = self._ray.exceptions
        try:
            host, pid, said = self._ray.get(reference)
        except errors.RayTaskError as err:  # not of the work, whose errors are answers
            advice = "Every machine of the cluster needs the same mendlm and torch."
            raise located(
                WorkerError(f"a machine of the cluster cannot work: {_reason(err.cause or err)} {advice}"), place(task)
            ) from err
        except errors.RayError as err:
            how = _reason(err)
            if self._timeout is not None:
                how += f" Or it took longer than the task timeout of {self._timeout:g} s."
            tries.failed(task, how)
            self._looked = -float("inf")  # a machine may be gone
            return None
        parts = [memoryview(bytearray(part)) for part in said.parts]  # a copy, so that Ray's memory is free again
        said = replace(said, parts=parts)
        if host != platform.node():  # the peak is of this machine
            said = replace(said, peak_memory_bytes=0)
        return compressed(said, task, f"process {pid} of {host}")


def _work(job: Job, task: Task, timeout: float | None, versions: dict[str, str]) -> tuple[str, int, Answer]:
    """Compress the tensors of a task, in a process of a machine of the cluster."""
    host = platform.node()
    if _versions() != versions:
        error = WorkerError(f"the machine {host!r} has {_versions()}, and the one that was started {versions}.")
        return host, os.getpid(), failure(error)
    if timeout is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, whatever that is at
        signal.setitimer(signal.ITIMER_REAL, timeout * len(task))
    try:
        said = answer(job, task, job.devices[0])
    finally:
        if timeout is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
    parts: list[Any] = [np.frombuffer(part, dtype=np.uint8) for part in said.parts]  # Ray sends arrays without copies
    return host, os.getpid(), replace(said, parts=parts)


def _versions() -> dict[str, str]:
    """What the bytes depend on."""
    return {"mendlm": mendlm.__version__, "torch": str(torch.__version__)}


def _reason(err: BaseException) -> str:
    """What an error of Ray says first, as a sentence."""
    return (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(" .") + "."


def _import_ray() -> Any:
    # Read when Ray is imported: nothing is sent to its makers, and no warning about GPUs that tasks do not ask for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as err:
        raise MissingDependencyError("the executor 'ray' needs Ray: pip install 'mendlm[ray]'.") from err
    return ray


def _check_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as err:
        raise UsageError(f"nothing answers at the Ray address {address!r}: {err}. {_HOW_TO_START}") from err


_HOW_TO_START = "Start a cluster with `ray start --head`, or pass --ray-address local for one of this machine alone."


@contextlib.contextmanager
def _connected(address: str, workers: int | None) -> Iterator[None]:
    """A connection for the length of the block; one that was there before stays, and so does its cluster."""
    ray = _import_ray()
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here):
            raise WorkerError(f"this process is connected to the Ray cluster {here!r}: ray_address must be 'auto'.")
        yield
        return
    given: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        given |= {"num_cpus": workers or torch.get_num_threads(), "include_dashboard": False}
    is_main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM) if is_main else None  # Ray sets its own
    try:
        try:
            ray.init(**given)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as err:
            raise WorkerError(f"cannot connect to a Ray cluster ({address}): {_reason(err)} {_HOW_TO_START}") from err
        yield
    finally:
        ray.shutdown()
        if is_main and on_term is not None:
            signal.signal(signal.SIGTERM, on_term)
