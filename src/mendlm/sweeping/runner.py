"""Running points: some at a time, each in a process of its own that leaves its work to be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mendlm._processes import ended, line_of, program_of
from mendlm.checkpoints.staging import partial_folder

_PROGRAM = program_of("mendlm.sweeping._worker")
_STOP_SECONDS = 30.0  # that processes have to stop by themselves, after which they are killed


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated on; as in `mendlm.evaluation.perplexity.evaluate`."""

    text: str | None = None
    dataset: str | None = None
    n_windows: int | None = None
    seqlen: int | None = None


@dataclass(frozen=True)
class Job:
    """One model to evaluate, after compressing it if there is a recipe.

    Attributes
    ----------
    name : of the point.
    model : a dense checkpoint folder.
    evaluation : on what.
    recipe : `Recipe.to_dict()`; None evaluates the model as it is.
    out : folder of the compressed model; None without a recipe.
    device : cpu, cuda or cuda:N.
    """

    name: str
    model: str
    evaluation: EvaluationSettings
    recipe: Mapping[str, Any] | None = None
    out: str | None = None
    device: str = "cpu"


class Watcher(Protocol):
    """Is told what becomes of jobs, in the caller's thread."""

    def started(self, job: Job) -> None:
        """The process of `job` has been started."""

    def noted(self, job: Job, what: str) -> None:
        """`job` is at `what`."""

    def measured(self, job: Job, figures: dict[str, Any]) -> None:
        """`job` gave `figures`: fields of a `SweepRecord`."""

    def failed(self, job: Job, error: str) -> None:
        """`job` ended with the sentence `error`."""


def run_jobs(jobs: Iterable[Job], watcher: Watcher, *, workers: int = 1, minutes: float | None = None) -> None:
    """Run `jobs` in their order.

    Parameters
    ----------
    workers : jobs at a time; several share the CPUs, unless OMP_NUM_THREADS says how many threads each has.
    minutes : start no job after so many; None: all start.

    Notes
    -----
    Any exception, KeyboardInterrupt too, stops the jobs that run; what they have done so far stays beside their
    folders, and the same job goes on from there.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    environment = dict(os.environ)
    if workers > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _n_cpus() // workers)))
    waiting = iter(jobs)
    running: list[_Process] = []
    inbox: queue.SimpleQueue[tuple[_Process, dict[str, Any]]] = queue.SimpleQueue()
    try:
        while True:
            while len(running) < workers and (end is None or time.monotonic() < end):
                job = next(waiting, None)
                if job is None:
                    break
                running.append(_Process(job, environment, inbox))
                watcher.started(job)
            if not running:
                return
            process, message = inbox.get()
            if "note" in message:
                watcher.noted(process.job, message["note"])
                continue
            running.remove(process)
            if "figures" in message:
                watcher.measured(process.job, message["figures"])
            else:
                watcher.failed(process.job, message["error"]["message"])
    finally:
        _stop(running)


def _n_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Process:
    """A job at work; what it says goes to `inbox`, a figure or an error last."""

    def __init__(
        self, job: Job, environment: Mapping[str, str], inbox: queue.SimpleQueue[tuple[_Process, dict[str, Any]]]
    ) -> None:
        self.job = job
        self._inbox = inbox
        self._stderr = tempfile.TemporaryFile()
        self.popen = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            errors="replace",
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for the parent, which then stops its jobs in order
        )
        with contextlib.suppress(BrokenPipeError):  # it ended at once: its exit code says why
            self._stdin.write(line_of(asdict(job) | asdict(job.evaluation)))
            self._stdin.flush()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def _stdin(self) -> Any:
        return self.popen.stdin

    def stop(self) -> None:
        """Ask it to stop."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()

    def _listen(self) -> None:
        answer: dict[str, Any] | None = None
        stdout: Any = self.popen.stdout
        with stdout:
            for line in stdout:
                with contextlib.suppress(ValueError):
                    answer = json.loads(line)
                if answer is not None and "note" in answer:
                    self._inbox.put((self, answer))
                    answer = None
        code = self.popen.wait()
        self.stop()
        with self._stderr as file:
            file.seek(0)
            said = file.read().decode("utf-8", "replace")
        self._inbox.put((self, answer or {"error": {"message": ended(code, said)}}))


def _stop(running: list[_Process]) -> None:
    """Let processes stop, and end those that do not."""
    try:
        for process in running:
            process.stop()
        end = time.monotonic() + _STOP_SECONDS
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, end - time.monotonic()))
    finally:
        for process in running:
            process.popen.kill()
            process.popen.wait()


def remove_work(out: Path) -> None:
    """Remove a compressed folder and what an unfinished run left beside it."""
    for folder in (out, partial_folder(out)):
        shutil.rmtree(folder, ignore_errors=True)
