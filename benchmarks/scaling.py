"""TLR, k = 128, T = 50, on a checkpoint of LLaMA-7B's shape: time of each tensor beside its bare matrix products.

    python benchmarks/llama_shape.py work/llama-4 --blocks 4
    python benchmarks/scaling.py work/llama-4 [--only GLOB …] [--n-iter 50]

Seconds are of the processor, all threads added, so that other work on the machine changes them little; wall time is
beside them. The bare products of a shape are timed in the same run, right after its first tensor: all that a step of
the subspace iteration multiplies (`products`), with the same column counts, and nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import mendlm
from _common import report
from mendlm import TLR, Recipe, Unstructured
from mendlm._memory import peak_memory_bytes
from mendlm.execution.run import Event, TensorDone, TensorStarted
from mendlm.linalg import OVERSAMPLING
from mendlm.refiners.tlr import LOOKAHEAD_STEPS


def products(d_out: int, d_in: int, refiner: TLR) -> list[tuple[int, int]]:
    """(c, r) of every step of the subspace iteration: columns multiplied, and of them formed into L (0: none)."""
    lookahead = LOOKAHEAD_STEPS * (refiner.rank - 1) // max(refiner.n_iter - 1, 1)
    most = min(refiner.rank + OVERSAMPLING, d_out, d_in)
    steps = [(min(r + OVERSAMPLING + lookahead, most), r) for r in map(refiner.rank_at, range(refiner.n_iter))]
    first, last = steps[0][0], most
    return [(first, 0), (first, 0), *steps, (last, 0), (last, 0), (last, refiner.rank)]


def flops(d_out: int, d_in: int, refiner: TLR) -> float:
    """Of those products: M V and Mᵀ Q (2 d_out d_in c each), L (2 d_out d_in r), and four of c columns by c."""
    return sum(
        2.0 * d_out * d_in * (2 * c + r) + 2.0 * c * c * (2 * d_out + 2 * d_in)
        for c, r in products(d_out, d_in, refiner)
    )


def bare_products(d_out: int, d_in: int, refiner: TLR) -> tuple[float, float]:
    """Processor and wall seconds of the products alone, on buffers of their own."""
    M, L = torch.randn(d_out, d_in), torch.empty(d_out, d_in)
    width = refiner.rank + OVERSAMPLING
    V, Q, E = torch.randn(d_in, width), torch.randn(d_out, width), torch.randn(width, width)
    cpu, wall = time.process_time(), time.perf_counter()
    for c, r in products(d_out, d_in, refiner):
        Y = M @ V[:, :c]
        Y.T @ Y  # orthonormalization: the Gram matrix, and a triangular solve of as many flops
        Y @ E[:c, :c]
        Z = M.T @ Q[:, :c]
        Z.T @ Z  # Rayleigh-Ritz, and the rotation
        Z @ E[:c, :c]
        if r:
            torch.mm(Q[:, :r], V[:, :r].T, out=L)
    return time.process_time() - cpu, time.perf_counter() - wall


class Watch:
    """Times every tensor, by the events of a run."""

    def __init__(self, refiner: TLR) -> None:
        self._refiner = refiner
        self._began = 0.0
        self._bare: dict[tuple[int, ...], tuple[float, float]] = {}
        self.rows: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """Note a tensor that is done."""
        if isinstance(event, TensorStarted):
            self._began = time.process_time()
        if not isinstance(event, TensorDone):
            return
        seconds, peak = time.process_time() - self._began, peak_memory_bytes()
        d_out, d_in = event.record.shape
        if (d_out, d_in) not in self._bare:
            self._bare[d_out, d_in] = bare_products(d_out, d_in, self._refiner)
        bare, bare_wall = self._bare[d_out, d_in]
        self.rows.append(
            {
                "tensor": event.record.name,
                "shape": f"{d_out}x{d_in}",
                "cpu_seconds": seconds,
                "bare_cpu_seconds": bare,
                "times_bare": seconds / bare,
                "wall_seconds": event.seconds,
                "bare_wall_seconds": bare_wall,
                "bare_gflops_per_cpu_second": flops(d_out, d_in, self._refiner) / bare / 1e9,
                "peak_gb": peak / 1e9,
                "rel_error": event.record.rel_error,
            }
        )
        print(self.rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="globs on tensor names; all projections if not given")
    parser.add_argument("--n-iter", type=int, default=50)
    options = parser.parse_args()
    refiner = TLR(128, n_iter=options.n_iter)
    recipe = Recipe(pattern=Unstructured(0.5), refiner=refiner, include=tuple(options.only))
    watch = Watch(refiner)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
        began = time.perf_counter()
        mendlm.compress(options.folder, Path(scratch) / "out", recipe, on_event=watch)
        wall = time.perf_counter() - began
    notes = f"T = {options.n_iter}; {wall:.0f} s in all, bare products and copies included."
    report("scaling", "cpu", watch.rows, notes)


if __name__ == "__main__":
    main()
