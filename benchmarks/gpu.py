"""Compressed layers on a CUDA device against dense bfloat16 ones, on the MLP shapes of LLaMA-7B, with rank 128.

    python benchmarks/gpu.py [--rank 128] [--tokens 4096] [--batches 1 4 16]

Prefill: the semi-structured runtime (2:4), as Python calls it four times in a row, and in a CUDA graph, where what the
CPU does before each product costs nothing; and the packed runtime, which unpacks S. Decode: the packed runtime's Triton
kernels for each pattern, in a CUDA graph, with their share of the memory bandwidth; the ceiling is what a copy reaches.
Weights are random and larger together than the cache of the device.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from _common import report
from mendlm.errors import UsageError
from mendlm.kernels.packed import packed_linear
from mendlm.packing import half_of, pack_mask
from mendlm.runtime import SparseLowRankLinear

SHAPES = [(11008, 4096), (4096, 11008)]
DTYPE = torch.bfloat16
WORKING_SET = 2**30  # bytes that decoding goes through before it meets a weight again
Run = Callable[[Tensor], Tensor]


def random_layer(d_out: int, d_in: int, rank: int, pattern: str) -> SparseLowRankLinear:
    """A random packed layer at 50 %: "2:4", "4:8" or "50 %", which keeps any entries."""
    if pattern == "50 %":
        mask = torch.rand(d_out, d_in, device="cuda") < 0.5
    else:
        n, m = map(int, pattern.split(":"))
        order = torch.rand(d_out, d_in // m, m, device="cuda").argsort(dim=2)
        mask = (order < n).reshape(d_out, d_in)
    layer = SparseLowRankLinear(d_in, d_out, n_kept=int(mask.sum()), rank=rank, dtype=DTYPE, device="cuda")
    with torch.no_grad():
        layer.weight_bitmask.copy_(pack_mask(mask))
        for parameter in layer.parameters():
            parameter.normal_()
    layer.check()
    return layer.eval()


def seconds(*works: Callable[[], Any], repeats: int = 9) -> list[float]:
    """Median time of each of `works` on the device, which take turns: it heats up and slows down for all alike."""
    for work in works:
        work()
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, found in zip(works, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
    return [statistics.median(found) for found in times]


def seconds_a_call(x: Tensor, *groups: Sequence[Run]) -> list[float]:
    """Time of a call of each group, its runs one after the other in a CUDA graph, where launches cost nothing."""
    graphs = []
    for runs in groups:
        for run in runs:  # tunes, compiles
            run(x)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for run in runs:
                run(x)
    times = seconds(*(graph.replay for graph in graphs))
    return [time / len(runs) for time, runs in zip(times, groups, strict=True)]


def bandwidth() -> float:
    """Bytes a second of a copy within the device, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))[0]


def must_agree(found: Tensor, expected: Tensor) -> None:
    """A wrong product is not worth timing."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if error > 0.02:
        sys.exit(f"the product is wrong by {error:.2g} of its norm; nothing was timed")


def prefill(shape: tuple[int, int], rank: int, n_tokens: int) -> Iterator[dict[str, Any]]:
    layer = random_layer(*shape, rank, "2:4")
    x = torch.randn(n_tokens, shape[1], dtype=DTYPE, device="cuda")
    packed = layer.packed_tensors()
    S = layer._S_and_B()[0]
    dense = S.detach() + packed["lora_B"].detach() @ packed["lora_A"].detach()
    for runtime in ("packed", "semi-structured"):
        try:
            layer.set_runtime(runtime)
        except UsageError as err:
            sys.exit(str(err))
        must_agree(layer(x), linear(x, dense))
        works = (lambda: [linear(x, dense) for _ in range(4)]), (lambda: [layer(x) for _ in range(4)])
        times = [time / 4 for time in seconds(*works)]
        yield row("prefill, called", runtime, "2:4", shape, n_tokens, *times)
        try:
            times = seconds_a_call(x, [lambda x: linear(x, dense)] * 4, [layer] * 4)
        except RuntimeError as err:
            print(f"no CUDA graph of the runtime {runtime!r}: {err}", file=sys.stderr)
            continue
        yield row("prefill, graph", runtime, "2:4", shape, n_tokens, *times)


def decode(shape: tuple[int, int], rank: int, pattern: str, n_tokens: int, ceiling: float) -> dict[str, Any]:
    x = torch.randn(n_tokens, shape[1], dtype=DTYPE, device="cuda")
    dense_bytes = 2 * shape[0] * shape[1]
    copies = -(-WORKING_SET // (dense_bytes // 2))
    first = random_layer(*shape, rank, pattern)
    layers = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    packed_bytes = sum(t.numel() * t.element_size() for t in layers[0].packed_tensors().values())
    packed = [kernel_of(layer) for layer in layers]
    weights = [torch.empty(shape, dtype=DTYPE, device="cuda").normal_() for _ in range(copies)]
    dense: list[Run] = [lambda x, W=W: linear(x, W) for W in weights]
    layers[0].set_runtime("factored")
    must_agree(packed[0](x), layers[0](x))
    times = seconds_a_call(x, dense, packed)
    shares = {
        "dense_bandwidth_share": dense_bytes / times[0] / ceiling,
        "bandwidth_share": packed_bytes / times[1] / ceiling,
    }
    return row("decode", "packed", pattern, shape, n_tokens, *times) | shares


def kernel_of(layer: SparseLowRankLinear) -> Run:
    """The packed kernel, whatever the runtime would choose for so many tokens."""
    t = {name: tensor.detach() for name, tensor in layer.packed_tensors().items()}
    S = t["weight_values"], t["weight_bitmask"], layer.row_starts
    half = half_of(t["weight_bitmask"])
    return lambda x: packed_linear(x, *S, t["lora_A"], t["lora_B"], None, half)


def row(
    phase: str, runtime: str, pattern: str, shape: tuple[int, int], n_tokens: int, dense: float, this: float
) -> dict[str, Any]:
    found = {
        "phase": phase,
        "runtime": runtime,
        "pattern": pattern,
        "layer": f"{shape[0]} x {shape[1]}",
        "tokens": n_tokens,
        "dense_us": 1e6 * dense,
        "this_us": 1e6 * this,
        "times_faster": dense / this,
        "dense_bandwidth_share": None,
        "bandwidth_share": None,
    }
    print(found, flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prefill")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="tokens of a decoding step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch finds none here", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(0)
    ceiling = bandwidth()
    rows = []
    for pattern in ("2:4", "4:8", "50 %"):
        rows += [decode(shape, options.rank, pattern, n, ceiling) for shape in SHAPES for n in options.batches]
    for shape in SHAPES:
        rows += prefill(shape, options.rank, options.tokens)
    notes = f"rank {options.rank}, {DTYPE}; a copy moves {ceiling / 1e9:.0f} GB/s"
    report("gpu", "cuda", rows, notes)


if __name__ == "__main__":
    main()
