"""TLR, k = 128, T = 50, in the shape of LLaMA: what it costs, measured, and how it spreads over workers, simulated.

    python benchmarks/llama_shape.py work/llama-4 --blocks 4
    python benchmarks/scaling.py work/llama-4 [--only GLOB …] [--n-iter 50]
    python benchmarks/scaling.py --simulate         # 7B and 70B on 1 to 1,000 workers, from the seconds measured
    python benchmarks/scaling.py --writer FOLDER    # MB/s of the writer there
    python benchmarks/scaling.py --stacked [--device cuda]  # matrices of one shape together, and one by one

Seconds are of the processor, all threads added, so that other work on the machine changes them little; wall time is
beside them. The bare products are timed in the same run, right after every tensor, since machines are not as fast every
minute: all that the steps of the subspace iteration multiply (`products`), with the same column counts, nothing else.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mendlm
from _common import ROOT, report, synchronize
from llama_shape import LLAMA_7B, LLAMA_70B, Llama, matrix
from mendlm import TLR, Recipe, Unstructured
from mendlm._memory import peak_memory_bytes
from mendlm.checkpoints.reader import CHUNK_BYTES
from mendlm.checkpoints.writer import ShardLayout, ShardWriter
from mendlm.execution.run import Event, TensorDone, TensorStarted
from mendlm.linalg import OVERSAMPLING
from mendlm.refiners import refine_stack
from mendlm.refiners.tlr import LOOKAHEAD_STEPS

# Matrices, d_out, d_in, rank: projections of small models, experts, and ever larger ones.
STACKS = [
    (16, 192, 576, 16),
    (16, 576, 1536, 16),
    (16, 768, 2048, 64),
    (16, 1024, 2048, 128),
    (8, 2048, 2048, 128),
    (4, 2048, 5632, 128),
    (2, 4096, 4096, 128),
]


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
        self.rows: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """Note a tensor that is done."""
        if isinstance(event, TensorStarted):
            self._began = time.process_time()
        if not isinstance(event, TensorDone):
            return
        seconds, peak = time.process_time() - self._began, peak_memory_bytes()
        d_out, d_in = event.record.shape
        bare, bare_wall = bare_products(d_out, d_in, self._refiner)
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


@dataclass(frozen=True)
class Task:
    """A tensor as a task: seconds of one worker, and bytes of its result."""

    seconds: float
    n_bytes: float


@dataclass(frozen=True)
class Outcome:
    """What a simulated run comes to.

    Attributes
    ----------
    makespan : seconds from the start to the last byte written.
    efficiency : seconds of the tasks over workers times makespan.
    tail : seconds from the moment at which a worker first finds no task to the end.
    blocked : share of the workers' time in which they hold a result that the writer does not take.
    writer_busy : share of the makespan in which the writer writes.
    """

    makespan: float
    efficiency: float
    tail: float
    blocked: float
    writer_busy: float


def simulate(
    tasks: Sequence[Task],
    n_workers: int,
    *,
    rate: float = math.inf,
    queue: int = 0,
    copied_bytes: float = 0.0,
    losses: Mapping[int, float] | None = None,
    restart: float = 0.0,
) -> Outcome:
    """Tasks on workers, the longest first, and one writer.

    A worker that is done takes its next task as soon as its result is taken, before it is written. While the writer
    writes, `queue` results wait for it (0 as with the local executor); a worker with another one waits itself.

    Parameters
    ----------
    rate : bytes per second of the writer.
    copied_bytes : what the writer writes before the first task begins: the tensors that stay dense.
    losses : index of a task -> share of its seconds after which the worker of its first try dies. The task goes to the
        next worker that is free, and the worker is back after `restart` seconds.
    """
    order = itertools.count()
    events: list[tuple[float, int, str, int]] = []  # (when, tie-break, what, task)
    pending = deque(sorted(range(len(tasks)), key=lambda task: -tasks[task].seconds))
    lost = dict(losses or {})
    waiting: deque[int] = deque()
    blocked: deque[tuple[int, float]] = deque()  # (task, since)
    now = start = copied_bytes / rate
    writing, n_idle, first_idle, waited, wrote = False, n_workers, math.inf, 0.0, start
    n_left = len(tasks)

    def after(seconds: float, what: str, task: int = -1) -> None:
        heapq.heappush(events, (now + seconds, next(order), what, task))

    def feed() -> None:
        nonlocal n_idle, first_idle
        while n_idle and pending:
            task = pending.popleft()
            share = lost.pop(task, None)
            n_idle -= 1
            after(tasks[task].seconds * (1 if share is None else share), "done" if share is None else "lost", task)
        if n_idle:
            first_idle = min(first_idle, now)

    def write(task: int) -> None:
        nonlocal writing, wrote
        writing = True
        seconds = tasks[task].n_bytes / rate
        wrote += seconds
        after(seconds, "written")

    feed()
    while n_left:
        now, _, what, task = heapq.heappop(events)
        if what == "written":
            writing = False
            n_left -= 1
            if not waiting and not blocked:
                continue
            if blocked:
                held, since = blocked.popleft()
                waiting.append(held)
                waited += now - since
                n_idle += 1
            write(waiting.popleft())
        elif what == "lost":
            pending.appendleft(task)
            after(restart, "back")
        elif what == "back":
            n_idle += 1
        elif writing and len(waiting) >= queue:
            blocked.append((task, now))
        else:
            n_idle += 1
            if writing:
                waiting.append(task)
            else:
                write(task)
        feed()
    work = sum(task.seconds for task in tasks)
    paid = n_workers * now
    return Outcome(now, work / paid, max(now - first_idle, 0.0), waited / paid, wrote / now)


def draw_losses(tasks: Sequence[Task], mean_seconds: float, seed: int = 0) -> dict[int, float]:
    """The first tries that a worker does not live to end, with `mean_seconds` from one death to the next."""
    rng = random.Random(seed)
    deaths = ((index, rng.expovariate(1 / mean_seconds) / task.seconds) for index, task in enumerate(tasks))
    return {index: share for index, share in deaths if share < 1}


def stored_bytes(d_out: int, d_in: int, rank: int) -> int:
    """Of the packed layout (docs/format.md), at 50 % in a dtype of two bytes."""
    return d_out * d_in + d_out * math.ceil(d_in / 8) + 2 * rank * (d_out + d_in)


def crossing(tasks: Sequence[Task], rate: float) -> float:
    """The number of workers whose results together are as many bytes per second as the writer takes."""
    return rate * sum(task.seconds for task in tasks) / sum(task.n_bytes for task in tasks)


def model_tasks(model: Llama, refiner: TLR, measured: Mapping[str, float]) -> list[Task]:
    """Of all its tensors. Shapes that were not measured take the flops per second of the slowest that was."""
    slowest = min(flops(*map(int, shape.split("x")), refiner) / seconds for shape, seconds in measured.items())
    return [
        Task(
            measured.get(f"{d_out}x{d_in}", flops(d_out, d_in, refiner) / slowest),
            stored_bytes(d_out, d_in, refiner.rank),
        )
        for d_out, d_in in list(model.projections().values()) * model.blocks
    ]


def simulated() -> Iterator[dict[str, Any]]:
    """The table of docs/scaling.md."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu.json").read_text())["rows"]
    shapes = {row["shape"] for row in rows}
    measured = {s: statistics.median(row["cpu_seconds"] for row in rows if row["shape"] == s) for s in shapes}
    for name, model in (("7B", LLAMA_7B), ("70B", LLAMA_70B)):
        tasks = model_tasks(model, TLR(128), measured)
        copied = 2.0 * 2 * model.vocab * model.hidden
        for rate, mean_death in ((1e9, math.inf), (1e8, math.inf), (1e9, 3600.0)):
            losses = {} if mean_death == math.inf else draw_losses(tasks, mean_death)
            for n_workers in (1, 2, 8, 64, 256, 1000):
                found = simulate(tasks, n_workers, rate=rate, copied_bytes=copied, losses=losses, restart=60.0)
                yield {
                    "model": name,
                    "writer_mb_per_s": rate / 1e6,
                    "mean_death": None if mean_death == math.inf else mean_death,  # seconds; None: never
                    "losses": len(losses),
                    "workers": n_workers,
                    "makespan": found.makespan,
                    "efficiency": found.efficiency,
                    "tail": found.tail,
                    "blocked": found.blocked,
                    "writer_busy": found.writer_busy,
                    "crossing": crossing(tasks, rate),
                }


def writer_rate(folder: Path, n_bytes: int = 2**30) -> dict[str, Any]:
    """Bytes per second of `ShardWriter`, checksum and a sync at the end included."""
    chunk = memoryview(random.Random(0).randbytes(CHUNK_BYTES))
    n_chunks = n_bytes // CHUNK_BYTES
    layout = ShardLayout("writer.safetensors", [("x", "U8", (n_chunks * CHUNK_BYTES,))], {})
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ShardWriter(Path(scratch), layout) as writer:
        writer.allocate()
        cpu, wall = time.process_time(), time.perf_counter()
        writer.write("x", itertools.repeat(chunk, n_chunks))
        writer.sync()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    written = n_chunks * CHUNK_BYTES / 1e6
    return {"mb": written, "mb_per_s": written / wall, "mb_per_cpu_second": written / cpu}


def stacked(n_iter: int, device: str) -> Iterator[dict[str, Any]]:
    """`refine_stack` against `refine` matrix by matrix; seconds are of the processor on a CPU, wall time elsewhere."""

    def now() -> float:
        synchronize(device)
        return time.process_time() if device == "cpu" else time.perf_counter()

    for n, d_out, d_in, rank in STACKS:
        if device == "cpu" and d_out * d_in > 2**21:  # they take minutes, and lose
            continue
        source = torch.Generator().manual_seed(0)
        weights = [matrix(d_out, d_in, source).to(device) for _ in range(n)]
        masks = [mendlm.select_mask(W, "magnitude", Unstructured(0.5)) for W in weights]
        refiner = TLR(rank, n_iter=n_iter, solver="subspace")

        def sources(n: int = n) -> list[torch.Generator]:
            return [torch.Generator(device=device).manual_seed(seed) for seed in range(n)]

        seconds = {"alone": math.inf, "together": math.inf}
        for _ in range(3):
            began = now()
            alone = [
                mendlm.refine(W, mask, refiner, generator=generator)
                for W, mask, generator in zip(weights, masks, sources(), strict=True)
            ]
            seconds["alone"] = min(seconds["alone"], now() - began)
            began = now()
            together = refine_stack(weights, masks, refiner, generators=sources())
            seconds["together"] = min(seconds["together"], now() - began)
        yield {
            "matrices": n,
            "shape": f"{d_out}x{d_in}",
            "rank": rank,
            "ms_alone": 1000 * seconds["alone"] / n,
            "ms_together": 1000 * seconds["together"] / n,
            "times": seconds["alone"] / seconds["together"],
            "rel_error": sum(one.rel_error for one in alone) / n,
            "rel_error_together": sum(one.rel_error for one in together) / n,
        }
        print(f"{n} of {d_out}x{d_in}: {seconds}", flush=True)


def measure(folder: Path, only: Sequence[str], n_iter: int) -> None:
    """Compress the tensors that `only` names, and report every one beside its bare products."""
    refiner = TLR(128, n_iter=n_iter)
    recipe = Recipe(pattern=Unstructured(0.5), refiner=refiner, include=tuple(only))
    watch = Watch(refiner)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        began = time.perf_counter()
        mendlm.compress(folder, Path(scratch) / "out", recipe, workers=1, on_event=watch)
        wall = time.perf_counter() - began
    spent, bare = (sum(row[key] for row in watch.rows) for key in ("cpu_seconds", "bare_cpu_seconds"))
    notes = (
        f"T = {n_iter}, one thread; the tensors took {spent:.0f} s of the processor, {spent / bare:.2f} times their "
        f"bare products; {wall:.0f} s in all, bare products and copies included."
    )
    report("scaling", "cpu", watch.rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint to measure")
    parser.add_argument("--only", nargs="+", default=[], help="globs on tensor names; all projections if not given")
    parser.add_argument("--n-iter", type=int, default=50)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--writer", type=Path, metavar="FOLDER")
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--device", default="cpu", help="of --stacked: cpu or cuda")
    options = parser.parse_args()
    if options.folder is not None:
        measure(options.folder, options.only, options.n_iter)
    if options.simulate:
        report("scaling-simulated", "cpu", list(simulated()), "Seconds; tasks timed by scaling-cpu.json.")
    if options.writer is not None:
        report("scaling-writer", "cpu", [writer_rate(options.writer)])
    if options.stacked:
        torch.set_num_threads(1)
        rows = list(stacked(options.n_iter, options.device))
        notes = f"Milliseconds for each matrix; T = {options.n_iter}, one thread of the CPU, the best of 3."
        report("scaling-stacked", options.device, rows, notes)


if __name__ == "__main__":
    main()
