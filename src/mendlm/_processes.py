"""Work in a process of its own: for its peak memory, and so that what ends it ends nothing else."""

from __future__ import annotations

import signal


def ended(returncode: int, stderr: str) -> str:
    """How a process ended that should have answered and did not, as a sentence."""
    if returncode < 0:
        number = -returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        memory = " Probably out of memory." if name == "SIGKILL" else ""
        return f"its process was ended by {name}.{memory}"
    said = stderr.strip().splitlines()[-1:] or ["nothing was said"]
    return f"its process failed with exit code {returncode}: {said[0]}"
