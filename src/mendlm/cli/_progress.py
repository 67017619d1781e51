"""Progress of a long command: a bar with the item's name and an ETA on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeRemaining

from mendlm.cli._console import console_for, format_seconds, safe


class ProgressView(Protocol):
    """What a command tells about its progress. Amounts are in any unit that costs about the same time throughout."""

    def started(self, name: str, done: float, total: float) -> None:
        """Work on the item `name` begins when `done` of `total` is done, by this run or by an earlier one."""

    def noted(self, what: str) -> None:
        """Something goes on that is no item; it gets the item's place on a bar, or a line."""

    def advanced(self, done: float, total: float, line: str) -> None:
        """`done` of `total` is done; `line` describes the item that ended."""


def counted(done: int, total: int) -> str:
    """``[ 3/30]``, as wide for every item."""
    return f"[{done:>{len(str(total))}}/{total}]"


@contextlib.contextmanager
def progress_view(stream: TextIO, label: str) -> Iterator[ProgressView]:
    """A bar on `stream` if it is a terminal that can move its cursor, else one flushed line per item."""
    if not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield _Lines(stream)
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn("{task.percentage:>3.0f}%", markup=False),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemaining(),
        TextColumn("{task.fields[item]}", markup=False),
        console=console_for(stream),
        transient=True,
        speed_estimate_period=600,
    )
    with bar:
        yield _Bar(bar, bar.add_task(label, total=None, item=""))


class _Bar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._begun = False

    def started(self, name: str, done: float, total: float) -> None:
        if not self._begun:  # what an earlier run did says nothing about the speed of this one
            self._bar.reset(self._task, total=total, completed=int(done))
            self._begun = True
        self._bar.update(self._task, item=safe(name))

    def noted(self, what: str) -> None:
        self._bar.update(self._task, item=safe(what))

    def advanced(self, done: float, total: float, line: str) -> None:
        self._bar.update(self._task, completed=done, total=total)


class _Lines:
    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._begin: tuple[float, float] | None = None  # when, and how much was done then

    def started(self, name: str, done: float, total: float) -> None:
        if self._begin is None:
            self._begin = (self._clock(), done)

    def noted(self, what: str) -> None:
        self._stream.write(f"{safe(what)}\n")
        self._stream.flush()

    def advanced(self, done: float, total: float, line: str) -> None:
        now = self._clock()
        when, before = self._begin = self._begin or (now, done)
        left = (now - when) * (total - done) / (done - before) if done > before else None
        eta = f"  eta {format_seconds(left)}" if left else ""
        self._stream.write(f"{safe(line)}{eta}\n")
        self._stream.flush()
