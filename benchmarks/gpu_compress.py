"""A checkpoint of LLaMA-7B's shape, compressed on a CUDA device: TLR, k = 128, T = 50, at 50 %.

    python benchmarks/gpu_compress.py FOLDER [--blocks 32] [--workers 1] [--exact-n-iter 50]

FOLDER is on a fast disk, or in memory (a tmpfs), with room for 23 GB at 32 blocks; the checkpoint is made in it, on the
device, unless it is there. Two tables in one: the whole checkpoint, from the first byte read to the last one written,
and what share of the device's float32 matrix rate its products come to; single matrices with the exact solver against
the subspace iteration, time and error.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import mendlm
from _common import median_seconds, report
from llama_shape import LLAMA_7B, matrix, write
from mendlm import TLR, Recipe, Unstructured, refine, select_mask
from scaling import flops

RANK, HALF = 128, Unstructured(0.5)
SHAPES = [(4096, 4096), (11008, 4096)]
SIDE = 8192  # of the square product that gives the matrix rate


def matrix_rate() -> float:
    """Floating-point operations a second of a large float32 product, in the precision that mendlm computes in."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda") for _ in range(2))
    return 2 * SIDE**3 / median_seconds(lambda: a @ b, device="cuda")


def solvers(rate: float, n_iter: int) -> Iterator[dict[str, Any]]:
    """Both solvers on one matrix of each shape."""
    for d_out, d_in in SHAPES:
        W = matrix(d_out, d_in, torch.Generator("cuda").manual_seed(0)).bfloat16()
        mask = select_mask(W, "magnitude", HALF)
        for solver in ("subspace", "exact"):
            refiner = TLR(RANK, n_iter=n_iter, solver=solver)  # type: ignore[arg-type]
            if solver == "subspace":
                refine(W, mask, refiner)  # libraries load
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = refine(W, mask, refiner)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            products = flops(d_out, d_in, refiner) if solver == "subspace" else None
            yield {
                "what": f"one matrix, {solver}",
                "shape": f"{d_out} x {d_in}",
                "n_iter": n_iter,
                "seconds": seconds,
                "rel_error": out.rel_error,
                "objective": out.objective,
                "matrix_rate_share": None if products is None else products / seconds / rate,
                "peak_device_gb": None,
            }


def checkpoint(folder: Path, n_blocks: int, workers: int | None, rate: float) -> dict[str, Any]:
    """Make it, compress it, delete the result."""
    dense, out = folder / f"llama-{n_blocks}", folder / "out"
    if not dense.exists():
        write(dense, dataclasses.replace(LLAMA_7B, blocks=n_blocks), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = mendlm.compress(dense, out, Recipe(refiner=TLR(RANK), pattern=HALF), device="cuda", workers=workers)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    products = sum(flops(*record.shape, TLR(RANK)) for record in result.records)
    return {
        "what": f"checkpoint, {n_blocks} blocks, {len(result.records)} tensors, {workers or 1} worker(s)",
        "shape": f"{sum(record.dense_bytes for record in result.records) / 1e9:.1f} GB",
        "n_iter": 50,
        "seconds": seconds,
        "rel_error": sum(record.rel_error for record in result.records) / len(result.records),
        "objective": None,
        "matrix_rate_share": products / seconds / rate,
        # Several workers are processes of their own.
        "peak_device_gb": torch.cuda.max_memory_allocated() / 1e9 if workers in (None, 1) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="one run of the checkpoint for each")
    parser.add_argument(
        "--exact-n-iter", type=int, default=50, help="of the comparison of the solvers; 0: leave it out"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch finds none here", file=sys.stderr)
        sys.exit(2)
    rate = matrix_rate()
    rows = []
    for workers in options.workers:
        rows.append(checkpoint(options.folder, options.blocks, workers, rate))
        print(rows[-1], flush=True)
    if options.exact_n_iter:
        for row in solvers(rate, options.exact_n_iter):
            rows.append(row)
            print(row, flush=True)
    report("gpu-compress", "cuda", rows, f"float32 products of side {SIDE}: {rate / 1e12:.1f} TFLOP/s.")


if __name__ == "__main__":
    main()
