"""Work in a process of its own: for its peak memory, and so that what ends it ends nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, TextIO

_PROGRAM = """
import json, sys
job = json.loads(sys.stdin.readline())
sys.path[:] = job.pop("sys_path")
from {worker} import main
main(job)
"""


def program_of(worker: str) -> str:
    """What a new Python is to run: ``main(job)`` of the module `worker`, with the job in its first line of stdin.

    It has the modules of this process, wherever that found them; with ``-P`` no others from the working directory.
    """
    return _PROGRAM.format(worker=worker)


def line_of(job: Mapping[str, Any]) -> str:
    """The line that tells a program of `program_of` its job."""
    return json.dumps({**job, "sys_path": sys.path}) + "\n"


def answer_stream() -> TextIO:
    """In the new process: stdout, for answers alone. Whatever else is printed goes to stderr from now on."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return stream


def ended(returncode: int, stderr: str) -> str:
    """How a process ended that should have answered and did not, as a sentence."""
    if returncode < 0:
        number = -returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        memory = " Probably out of memory." if name == "SIGKILL" else ""
        return f"its process was ended by {name}.{memory}"
    said = stderr.strip().splitlines()[-1:] or ["nothing was said"]
    return f"its process failed with exit code {returncode}: {said[0]}"
