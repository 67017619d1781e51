"""The interface of an executor: where the tensors of a data-free run are compressed."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from mendlm.errors import UsageError, WorkerError, located
from mendlm.execution.tasks import Compressed, Job, Task, place

logger = logging.getLogger(__name__)

N_TRIES = 3  # of a task whose worker dies or hangs

Started = Callable[[Task], None]  # called when a task is handed to a worker


class Pool(ABC):
    """The workers of one run.

    Attributes
    ----------
    n_workers : how many there are; results that are finished and not yet taken are at most a few more.
    """

    n_workers: int

    @abstractmethod
    def compress(self, tasks: Sequence[Task], started: Started) -> Iterator[Compressed]:
        """Compress the tensors of `tasks`, begun in their order, yielded as they get ready.

        Raises
        ------
        NonFiniteError, UsageError, CheckpointError : a tensor cannot be compressed; the message names it.
        WorkerError : the process on a tensor died, or took too long, again and again.
        """


class AbstractExecutor(ABC):
    """How the tensors of a run are spread over processes and machines. The bytes do not depend on it.

    A new executor is one file in this folder and one line in `EXECUTORS`; the contract tests then cover it.
    """

    name: ClassVar[str]

    @abstractmethod
    def devices(self, name: str) -> tuple[torch.device, ...]:
        """The devices that `name` means to this executor.

        Raises
        ------
        UsageError : none, or not one that is there.
        """

    @abstractmethod
    def open(self, job: Job, tasks: Sequence[Task]) -> AbstractContextManager[Pool]:
        """Workers for a job; whatever ends the block ends them.

        Parameters
        ----------
        job : what they must know.
        tasks : what they will be given: at least one.

        Raises
        ------
        UsageError : settings that do not fit the job or the machines.
        """


class Tries:
    """How often the work on each task failed through no fault of its tensors."""

    def __init__(self) -> None:
        self._failures = Counter[str]()

    def failed(self, task: Task, how: str, advice: str = "") -> None:
        """Note that a try failed, `how` as a sentence; another may follow.

        Raises
        ------
        WorkerError : it was the last; with `advice`, a sentence.
        """
        self._failures[task[0].name] += 1
        n = self._failures[task[0].name]
        logger.warning("%s: try %d of %d failed: %s", place(task), n, N_TRIES, how)
        if n == N_TRIES:
            said = [how, f"That was try {n} of {N_TRIES}.", advice, "Run again with --resume."]
            raise located(WorkerError(" ".join(filter(None, said))), place(task))


def check_settings(workers: int | None, task_timeout: float | None) -> None:
    """Check what every executor is told.

    Raises
    ------
    UsageError : not positive.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be 1 or more, got {workers}.")
    if task_timeout is not None and not task_timeout > 0:
        raise UsageError(f"task_timeout must be a positive number of seconds, got {task_timeout:g}.")
