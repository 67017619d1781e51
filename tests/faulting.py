"""Real `mendlm` runs that are killed, interrupted or denied the disk at a chosen system call.

`Faults` starts one server, which has imported everything and forks a process for each run: a run then takes as long as
its work. In the fork the functions of `os` that change files are counted, and the n-th call is where it happens.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONS = ("--pattern", "2:4", "--rank", "2", "--n-iter", "1")
# What may fail where a disk is full, and what is counted in all.
NEEDS_SPACE = ("pwrite", "write", "posix_fallocate", "open", "mkdir")
COUNTED = (*NEEDS_SPACE, "fsync", "ftruncate", "rename", "unlink", "rmdir")


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (negative: the signal), what it printed, calls counted, and seconds."""

    code: int
    out: str
    err: str
    n_calls: int
    seconds: float


class Faults:
    """The server; a context manager."""

    def __enter__(self) -> Faults:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MENDLM_TRACEBACK": "0"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.close()
        stdout.close()
        self._server.wait(timeout=60)

    def run(self, *argv: str | Path, scratch: Path, at: int = 0, how: str = "", after: float | None = None) -> Ended:
        """Run ``mendlm ARGV``.

        Parameters
        ----------
        scratch : folder for what it prints.
        at, how : at this counted call, "before", "half" or "after" it: SIGKILL; "power": the same, and what had not
            reached the disk is in scratch/unsynced.json; "SIGINT": that signal, and again at the next call; the name of
            an error ("EIO"): the call fails with it, "ENOSPC": every call from there on that needs space.
        after : SIGKILL after so many seconds.
        """
        job = {"argv": [str(arg) for arg in argv], "scratch": str(scratch), "at": at, "how": how, "after": after}
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        counted = scratch / "calls"
        n_calls = int(counted.read_text()) if counted.exists() else 0
        printed = [(scratch / name).read_text() for name in ("out", "err")]
        return Ended(answer["code"], *printed, n_calls, answer["seconds"])


def lose_power(scratch: Path, rng: random.Random) -> int:
    """Undo some of what had not reached the disk when the run of `scratch` ended; how many ranges and files."""
    unsynced = json.loads((scratch / "unsynced.json").read_text())
    n_lost = 0
    for name, facts in unsynced.items():
        path = Path(name)
        if not path.exists():
            continue
        with path.open("r+b") as file:
            for offset, length in facts["ranges"]:
                if rng.random() < 0.5:
                    file.seek(offset)
                    file.write(bytes(length))
                    n_lost += 1
            if facts["appended"] is not None:  # a file that only grows: its end is lost
                file.truncate(rng.randint(facts["appended"], path.stat().st_size))
                n_lost += 1
    return n_lost


def journaled(partial: Path) -> int:
    """Compressed tensors in the journal of an unfinished run."""
    with contextlib.suppress(FileNotFoundError):
        whole = (partial / "journal.jsonl").read_bytes()
        return sum(b'"record":{' in line for line in whole.split(b"\n")[:-1])
    return 0


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file that must be the same in every run."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "mendlm.run.json"}


def spread(n: int, total: int) -> list[int]:
    """`n` numbers from 1 to `total`, evenly."""
    return sorted({1 + i * total // n for i in range(n)})


class Place:
    """Where runs of one command write, and what an undisturbed one gives."""

    def __init__(self, faults: Faults, model: Path, folder: Path) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.out = folder / "runs" / "out"
        self.out.parent.mkdir()
        self.command: list[str | Path] = ["compress", model, self.out, *OPTIONS]
        whole = faults.run(*self.command, scratch=self.scratch)
        assert whole.code == 0, whole.err
        self.n_calls, self.seconds = whole.n_calls, whole.seconds
        self.reference = bytes_of(self.out)
        shutil.rmtree(self.out)


def resumes(faults: Faults, place: Place) -> Ended:
    """What must hold after a run was stopped, however: nothing half, and --resume gives the same bytes."""
    if place.out.exists():
        assert bytes_of(place.out) == place.reference
    ended = faults.run(*place.command, "--resume", "--json", scratch=place.scratch)
    assert ended.code == 0, ended.err
    assert bytes_of(place.out) == place.reference
    beside = [path.name for path in place.out.parent.iterdir() if path != place.out]
    assert beside == []
    shutil.rmtree(place.out)
    return ended


# ---------------------------------------------------------------------------------------------- in the server


def _serve() -> None:
    import torch

    import mendlm
    import mendlm.pipeline
    from mendlm import NM, TLR, Recipe
    from mendlm.cli import _app, main

    torch.set_num_threads(1)  # a fork of a process with more would wait for those it has not got
    # Whatever a run imports, imported once for all of them, and the parser, which takes a third of a run, made once.
    command = _app.build_command()
    _app.build_command = lambda: command
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        main(["compress", "no model", "nowhere", "--pattern", "2:4"])
    Recipe(pattern=NM(2, 4))
    W = torch.arange(64.0).reshape(8, 8)
    mendlm.refine(W, mendlm.select_mask(W, "magnitude", NM(2, 4)), TLR(rank=2, n_iter=1))
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _child(main, job)
        if job["after"] is not None:
            time.sleep(job["after"])
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)  # noqa: T201


def _child(main: Callable[[list[str]], int], job: dict[str, Any]) -> None:
    scratch = Path(job["scratch"])
    for name in ("calls", "unsynced.json"):
        (scratch / name).unlink(missing_ok=True)
    code = 70
    try:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdin = open(os.devnull)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hooks = _Hooks(scratch, job["at"], job["how"])
        with hooks:
            code = main(job["argv"])
        (scratch / "calls").write_text(str(hooks.n_calls))
        sys.stdout.flush()
    finally:
        os._exit(code)


class _Hooks:
    """The counted functions of `os`."""

    def __init__(self, scratch: Path, at: int, how: str) -> None:
        self.n_calls = 0
        self._scratch, self._at, self._how = scratch, at, how
        self._unsynced: dict[str, dict[str, Any]] = {}
        self._real = {name: getattr(os, name) for name in COUNTED}

    def __enter__(self) -> None:
        for name in COUNTED:
            setattr(os, name, self._hooked(name, self._real[name]))

    def __exit__(self, *_: object) -> None:
        for name in COUNTED:
            setattr(os, name, self._real[name])

    def _hooked(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*args, **kwargs)
            self.n_calls += 1
            if self._at:
                self._strike(name, real, args)
            result = real(*args, **kwargs)
            if self.n_calls == self._at and self._how == "after":
                self._die()
            self._follow(name, args)
            return result

        return call

    def _strike(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> None:
        here = self.n_calls == self._at
        if self._how == "ENOSPC" and self.n_calls >= self._at and name in NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._how == "SIGINT" and self.n_calls in (self._at, self._at + 1):
            signal.raise_signal(signal.SIGINT)
        elif here and self._how in ("before", "power"):
            self._die()
        elif here and self._how == "half":
            if name in ("pwrite", "write"):
                real(args[0], args[1][: len(args[1]) // 2], *args[2:])
            self._die()
        elif here and self._how.startswith("E"):
            raise OSError(getattr(errno, self._how), os.strerror(getattr(errno, self._how)))

    def _follow(self, name: str, args: tuple[Any, ...]) -> None:
        """Note what has been written and has not been synced."""
        if name not in ("pwrite", "write", "fsync"):
            return
        path = os.readlink(f"/proc/self/fd/{args[0]}")
        if name == "fsync":
            self._unsynced.pop(path, None)
            return
        facts = self._unsynced.setdefault(path, {"ranges": [], "appended": None})
        if name == "pwrite":
            facts["ranges"].append((args[2], len(args[1])))
        elif facts["appended"] is None:
            facts["appended"] = os.fstat(args[0]).st_size - len(args[1])

    def _die(self) -> None:
        if self._how == "power":
            fd = self._real["open"](self._scratch / "unsynced.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            self._real["write"](fd, json.dumps(self._unsynced).encode())
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def failing_reads(monkeypatch: Any, suffix: str, n_good: int) -> Iterator[None]:
    """Reads of files whose name ends in `suffix` fail with EIO after `n_good` good ones."""
    real = Path.open
    left = [n_good]

    class Failing:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def read(self, *args: Any) -> Any:
            self._count()
            return self._file.read(*args)

        def readinto(self, target: Any) -> Any:
            self._count()
            return self._file.readinto(target)

        def _count(self) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(self, *args, **kwargs)
        return Failing(file) if self.name.endswith(suffix) else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield


if __name__ == "__main__":
    _serve()
