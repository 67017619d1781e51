"""A worker process of the local executor: takes a job and then tasks from a pipe, answers with bytes."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection

from mendlm.execution.tasks import Answer, answer

END = b""  # in place of a task: there are no more


def main(fd: int, parent: int) -> None:
    """Work until the pipe says so, or until its other end, or the process `parent`, is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends its workers
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with Connection(fd) as pipe:
        try:
            job, device = pickle.loads(pipe.recv_bytes())
            while message := pipe.recv_bytes():
                _send(pipe, answer(job, pickle.loads(message), device))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _send(pipe: Connection, said: Answer) -> None:
    """Send an answer without its parts but with their sizes, then the bytes of those that have some."""
    pipe.send_bytes(pickle.dumps((replace(said, parts=[]), [part.nbytes for part in said.parts])))
    for part in said.parts:
        if part.nbytes:
            pipe.send_bytes(part)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
