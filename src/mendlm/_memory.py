"""Memory of this process: how much it took, and giving it back (freed is not returned by itself)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    try:
        # Not ru_maxrss where there is another way: Linux hands it on to the programs a process starts.
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that new processes can take without swapping: of the machine, or of this process's control group."""
    rooms = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        rooms.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # "max" is no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        rooms.append(max(0, limit - used))
    return min(rooms)


def trim() -> None:
    """Return the free pages of the C heap to the system, where its library can (glibc).

    glibc keeps freed blocks of up to 32 MB, and a run that loads one block of a model after the other finds them in
    pieces that do not fit: after 30 blocks of SmolLM2-135M it held twice what it used. Takes milliseconds.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        function: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return lambda pad: None
    return function
