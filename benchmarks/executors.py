"""One and two workers of the local executor and two of a Ray cluster on the same checkpoint; the bytes must agree.

    python benchmarks/executors.py [--blocks 2] [--rank 64] [--n-iter 20] [--repeats 3]
    python benchmarks/executors.py --model work/llama-4 --rank 128 --n-iter 50 --repeats 1

A random checkpoint of LLaMA blocks at half the width, or the one of --model, is compressed by each in turn, several
times. The cluster runs already; workers of both kinds are started by every run. `not_tensors_seconds` is what a run
takes beyond the seconds of its tensors shared among the workers: the start, waiting for a last tensor, and writing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mendlm
from _common import report
from llama_shape import Llama, write
from mendlm import TLR, Recipe
from mendlm.checkpoints.finish import hash_files
from mendlm.execution import AbstractExecutor, LocalExecutor, RayExecutor
from mendlm.pipeline import TensorDone


def measure(model: Path, out: Path, recipe: Recipe, executor: AbstractExecutor, workers: int) -> tuple[float, float]:
    """Wall seconds of a run, and those that are not the tensors' own."""
    seconds: list[float] = []

    def note(event: object) -> None:
        if isinstance(event, TensorDone):
            seconds.append(event.seconds)

    began = time.perf_counter()
    mendlm.compress(model, out, recipe, executor=executor, on_event=note)
    wall = time.perf_counter() - began
    return wall, wall - sum(seconds) / workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint, e.g. of benchmarks/llama_shape.py")
    parser.add_argument("--blocks", type=int, default=2, help="without --model")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--n-iter", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    from ray.cluster_utils import Cluster

    recipe = Recipe(refiner=TLR(options.rank, n_iter=options.n_iter))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    kinds: list[tuple[str, AbstractExecutor, int]] = [
        ("local", LocalExecutor(workers=1), 1),
        ("local", LocalExecutor(workers=2), 2),
        ("ray", RayExecutor(cluster.address, workers=None), 2),
    ]
    times: list[list[tuple[float, float]]] = [[] for _ in kinds]
    written = set()
    try:
        with tempfile.TemporaryDirectory(dir=None if options.model is None else options.model.parent) as scratch:
            model = options.model or Path(scratch) / "model"
            if options.model is None:
                half = Llama(hidden=2048, intermediate=5504, heads=16, kv=2048, blocks=options.blocks, vocab=1000)
                write(model, half)
            for _ in range(options.repeats):
                for index, (_, executor, workers) in enumerate(kinds):
                    out = Path(scratch) / f"out-{index}"
                    times[index].append(measure(model, out, recipe, executor, workers))
                    hashes = hash_files(out, sorted(path.name for path in out.glob("*.safetensors")))
                    written.add(tuple(file["sha256"] for file in hashes.values()))
                    for path in sorted(out.rglob("*"), reverse=True):
                        path.rmdir() if path.is_dir() else path.unlink()
                    out.rmdir()
    finally:
        cluster.shutdown()
    if len(written) != 1:
        raise SystemExit("the executors wrote different bytes")
    local = statistics.median(wall for wall, _ in times[1])
    rows: list[dict[str, Any]] = [
        {
            "executor": name,
            "workers": workers,
            "seconds": round(statistics.median(wall for wall, _ in runs), 2),
            "not_tensors_seconds": round(statistics.median(rest for _, rest in runs), 2),
            "over_local": round(statistics.median(wall for wall, _ in runs) / local, 3),
            "all_seconds": [round(wall, 2) for wall, _ in runs],
        }
        for (name, _, workers), runs in zip(kinds, times, strict=True)
    ]
    what = f"{options.blocks} blocks of half LLaMA-7B's width" if options.model is None else options.model.name
    report(
        "executors",
        "cpu",
        rows,
        f"{what}, TLR k = {options.rank}, T = {options.n_iter}; medians of {options.repeats} runs, in turn. "
        "Workers have one thread each.",
    )


if __name__ == "__main__":
    main()
