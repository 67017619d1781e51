"""Data-free work: every tensor by itself, or with others of its shape, on the workers of an executor."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from mendlm.checkpoints.writer import SYNC_SECONDS, ShardWriter
from mendlm.execution._base import AbstractExecutor
from mendlm.execution.run import Run
from mendlm.execution.tasks import N_THREADS, Job, Task, as_tasks, own_methods


class TensorRun(Run):
    """Copy what stays dense, compress the rest on workers, write every result as it comes.

    One worker takes the tasks in the order of the plan, several the largest first, so that they end together. A task
    of which an earlier run has written a part is done again as a whole: tensors that are refined together would have
    other last bits without the rest.

    Parameters
    ----------
    run : the arguments of `Run`.
    executor : who compresses.
    devices : where.
    """

    n_threads = N_THREADS

    def __init__(self, *run: Any, executor: AbstractExecutor, devices: tuple[torch.device, ...]) -> None:
        super().__init__(*run)
        self._executor = executor
        self._devices = devices
        self._n_begun = 0

    def execute(self) -> None:
        """Write every tensor that is not done yet; errors as `Run.execute` and `Pool.compress`."""
        tasks = as_tasks(self.plan.compressed, self.plan.recipe, self._devices[0])
        pending = [task for task in tasks if any(tensor.name not in self._done for tensor in task)]
        with ExitStack() as stack:
            writers = {
                shard.name: stack.enter_context(ShardWriter(self.staging.files, self.layouts[shard.name]))
                for shard in self.shards
            }
            pool = stack.enter_context(self._executor.open(self._job(), pending)) if pending else None
            for shard in self.shards:  # while the workers start
                for tensor in self._tensors(shard):
                    if tensor.action == "copy" and tensor.name not in self._done:
                        self._copy(writers[shard.name], shard, tensor)
            if pool is not None:
                self.n_workers = pool.n_workers
                if pool.n_workers > 1:
                    pending.sort(key=lambda task: -sum(tensor.dense_bytes for tensor in task))
                synced = time.monotonic()
                for done in pool.compress(pending, self._begin):
                    if done.tensor.name not in self._done:
                        self._write(writers[done.tensor.shard], done)
                    if time.monotonic() - synced > SYNC_SECONDS:
                        self._sync(writers.values())
                        synced = time.monotonic()
            self._sync(writers.values())

    def _begin(self, task: Task) -> None:
        for tensor in task:
            if tensor.name not in self._done:
                self._n_begun += 1
                self._started(tensor, self.n_resumed + self._n_begun)

    def _job(self) -> Job:
        shards = {shard.name: replace(shard, path=shard.path.absolute()) for shard in self.shards}
        return Job(self.plan.recipe, shards, self._devices, own_methods(self.plan.recipe))
