"""What a process that keeps one core busy costs a calibrated run and an evaluation, by how long waiting threads look.

    python benchmarks/shared_cores.py [--repeats N]

libgomp's threads look `GOMP_SPINCOUNT` times whether the others are there before they give their core away: 300,000
times by its own choice, 1,000 times by that of `mendlm` commands. Every time is that of a whole command, Python's start
included, on all cores of the machine; "beside" it another process computes without a pause on one of them, in a session
of its own, as a program in another terminal: Linux shares the time among sessions. The model is SmolLM2-135M, its text
the book that ships with mendlm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _common import ROOT, report, smollm2

SPINS = (300_000, 1_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    model = str(smollm2())
    text = str(ROOT / "src" / "mendlm" / "data" / "alice.txt")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "out"))
        blocks = "--preset balanced --include model.layers.[01].* --n-sequences 4 --seqlen 256 --overwrite".split()
        work = {
            "compress, 2 blocks, 4 × 256 tokens": ["compress", model, out, *blocks, "--calibration", text],
            "eval, 4 × 512 tokens": ["eval", model, "--text", text, "--seqlen", "512", "--n-windows", "4"],
        }
        rows = []
        for label, args in work.items():
            for spins in SPINS:
                alone = statistics.median(seconds(args, spins) for _ in range(repeats))
                with a_busy_core():
                    beside = statistics.median(seconds(args, spins) for _ in range(repeats))
                rows.append({"what": label, "spins": spins, "alone_s": alone, "beside_s": beside})
                print(rows[-1], flush=True)
    report("shared-cores", "cpu", [{**row, "times": row["beside_s"] / row["alone_s"]} for row in rows])


def seconds(args: list[str], spins: int) -> float:
    """Wall time of `mendlm ARGS`."""
    start = time.perf_counter()
    env = os.environ | {"GOMP_SPINCOUNT": str(spins), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "mendlm", *args], env=env, capture_output=True, check=True)
    return time.perf_counter() - start


@contextlib.contextmanager
def a_busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
