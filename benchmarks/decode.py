"""The CPU kernel for packed weights against a dense layer and against unpacking, for one and for more tokens.

    python benchmarks/decode.py [--threads 2] [--passes 15] [--patience 0]

Weights are random, 50 % unstructured and rank 128; only their shape matters. Every way cycles through enough copies of
its weights that they come from memory, as in a model, and not from a cache; ways take turns, pass by pass. Each time is
the median of all calls; the fastest call is given too, for a machine that others use. With --patience, passes wait, so
many seconds in all, for moments when no other process runs. The floor is the time in which the bytes of the packed
layer can be read at all; the rate of reading is the best that torch's sum of int64 or its dense float32 product reached
in the same run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from _common import report
from mendlm import SparseLowRankLinear
from mendlm.kernels import _cpu, packed
from mendlm.packing import pack_mask

SHAPES = [(4096, 4096), (11008, 4096)]
DTYPES = [torch.bfloat16, torch.float32]
RANK = 128
TOKENS = [2, 4, 16, 32, 64]
CACHE = 600e6  # bytes that no cache holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=15)
    parser.add_argument("--patience", type=float, default=0)
    args = parser.parse_args()
    if not packed.available():
        sys.exit(packed.unavailable())
    torch.set_num_threads(args.threads)
    quiet = Quiet(args.patience)
    rows, best_rate = [], 0.0
    cases = [(shape, dtype, 1) for shape in SHAPES for dtype in DTYPES]
    cases += [(SHAPES[0], dtype, tokens) for dtype in DTYPES for tokens in TOKENS]
    for (d_out, d_in), dtype, tokens in cases:
        layer, S = make_layer(d_out, d_in, dtype)
        times = measure(layer, S, tokens, args.passes if tokens == 1 else math.ceil(args.passes / 5), quiet)
        median = {way: statistics.median(seconds) for way, seconds in times.items() if seconds}
        packed_bytes = sum(t.nbytes for t in layer.packed_tensors().values())
        if tokens == 1:
            best_rate = max(best_rate, S.nbytes / median["sum"])
        if tokens == 1 and dtype == torch.float32:
            best_rate = max(best_rate, S.nbytes / median["dense"])
        rows.append(
            {
                "layer": f"{d_out} x {d_in}",
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                **{f"{way}_ms": 1e3 * median[way] for way in ("dense", "unpack", "kernel")},
                "speedup": median["dense"] / median["kernel"],
                "best_dense_ms": 1e3 * min(times["dense"]),
                "best_kernel_ms": 1e3 * min(times["kernel"]),
                "best_speedup": min(times["dense"]) / min(times["kernel"]),
                "kernel_mb": packed_bytes / 1e6,
                "kernel_gb_s": packed_bytes / 1e9 / median["kernel"],
            }
        )
    for row in rows:
        row["of_read_rate"] = row["kernel_gb_s"] * 1e9 / best_rate
    notes = (
        f"reading: {best_rate / 1e9:.1f} GB/s; kernel: {_cpu.isas()[-1]}; times are medians, best_ the fastest call; "
        f"{quiet.kept:.0%} of the passes began while nothing else ran"
    )
    report("decode", "cpu", rows, notes)


class Quiet:
    """Waits, `patience` seconds in all, for moments when this is the only process that runs (Linux)."""

    def __init__(self, patience: float) -> None:
        self.patience, self.passes, self.quiet = patience, 0, 0

    def wait(self) -> None:
        """Return in a quiet moment, or when patience is at an end."""
        in_a_row = 0
        while in_a_row < 5 and self.patience > 0:
            in_a_row = in_a_row + 1 if others() == 0 else 0
            self.patience -= 0.02
            time.sleep(0.02)
        self.passes += 1
        self.quiet += others() == 0

    @property
    def kept(self) -> float:
        """Share of the waits that ended in a quiet moment."""
        return self.quiet / self.passes


def others() -> int:
    """Processes besides this one that run now or wait for a CPU."""
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("procs_running")) - 1


def make_layer(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[SparseLowRankLinear, Tensor]:
    """A packed layer, and its S as a dense matrix of the size of the original weight."""
    mask = torch.rand(d_out, d_in) < 0.5
    S = (torch.randn(d_out, d_in) * mask).to(dtype)
    layer = SparseLowRankLinear(d_in, d_out, n_kept=int(mask.sum()), rank=RANK, dtype=dtype).requires_grad_(False)
    layer.weight_values.copy_(S[mask])
    layer.weight_bitmask.copy_(pack_mask(mask))
    layer.lora_A.normal_()
    layer.lora_B.normal_()
    layer.check()
    return layer, S


def measure(layer: SparseLowRankLinear, S: Tensor, tokens: int, passes: int, quiet: Quiet) -> dict[str, list[float]]:
    """Seconds of every call, by way."""
    x = torch.randn(tokens, layer.in_features).to(S.dtype)
    operands = (layer.weight_values, layer.weight_bitmask, layer.row_starts, layer.lora_A, layer.lora_B)
    copies = [tuple(t.clone() for t in operands) for _ in range(math.ceil(CACHE / sum(t.nbytes for t in operands)))]
    dense = [S.clone() for _ in range(math.ceil(CACHE / S.nbytes))]

    def unpack(values: Tensor, bitmask: Tensor, row_starts: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(x, packed.unpack(values, bitmask, row_starts, layer.in_features)) + linear(linear(x, A), B)

    ways: dict[str, list[Callable[[], object]]] = {
        "dense": [lambda W=W: linear(x, W) for W in dense],
        "kernel": [lambda c=c: packed.packed_linear(x, *c, None) for c in copies],
        "unpack": [lambda c=c: unpack(*c) for c in copies[:4]],
        "sum": [lambda W=W: W.view(torch.int64).sum() for W in dense] if tokens == 1 else [],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(passes + 1):
        for way, calls in ways.items():
            quiet.wait()
            for call in calls:
                start = time.perf_counter()
                call()
                if number:  # the first pass warms up
                    times[way].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        main()
