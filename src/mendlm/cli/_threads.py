"""How torch's threads wait for each other, which OpenMP takes from the environment when torch is loaded."""

from __future__ import annotations

import os
import sys

SPINS = 1000
"""How often a waiting thread looks before it gives its core away.

libgomp, with which torch comes on Linux, looks 300,000 times of its own choice: 16 ms in which the thread that is
waited for may lack that very core, where other programs run too (docs/scaling.md, "Beside other programs").
"""

ONE_BY_ONE = ("bench", "generate")
"""Commands that read tokens one by one, which takes a tenth longer where threads sleep between two layers."""


def share_cores(command: str | None) -> None:
    """Let the waiting threads of `command` give their cores away soon, unless the user has said how they wait."""
    said = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if command not in ONE_BY_ONE and not said and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
