"""Processor time to open a packed folder against the dense one: SmolLM2-135M at 50 %, rank 16, one thread.

    python benchmarks/loading.py [--repeats 15]

By turns in one process, in which everything is imported. `packed` and `factored` map the file; `merged` computes every
weight.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import mendlm
from _common import report, smollm2
from mendlm import Recipe, Unstructured, ZeroShotSVD


def opened(folder: Path, runtime: str | None) -> float:
    """Processor seconds."""
    began = time.process_time()
    mendlm.load(folder, runtime=runtime or "auto")
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        packed, dense = Path(scratch) / "packed", Path(scratch) / "dense"
        recipe = Recipe(pattern=Unstructured(0.5), refiner=ZeroShotSVD(rank=16), dtype="bfloat16")
        mendlm.compress(smollm2(), packed, recipe)
        mendlm.export(packed, dense, to="dense")
        cases: list[tuple[str, Path, str | None]] = [("dense", dense, None)]
        cases += [(runtime, packed, runtime) for runtime in ("packed", "factored", "merged")]
        times: dict[str, list[float]] = {name: [] for name, _, _ in cases}
        for turn in range(options.repeats + 1):
            for name, folder, runtime in cases:
                seconds = opened(folder, runtime)
                if turn:  # the first one imports
                    times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        {
            "runtime": name,
            "cpu_seconds": medians[name],
            "times_dense": medians[name] / medians["dense"],
            "least": min(t),
        }
        for name, t in times.items()
    ]
    report("loading", "cpu", rows, f"bfloat16; medians of {options.repeats}, by turns.")


if __name__ == "__main__":
    main()
