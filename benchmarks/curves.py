"""Error curves of plans against whole runs of the refiner at every rank. About 15 minutes of one thread.

    python benchmarks/curves.py [--layers 0,1,15,28]

For every projection of some layers of SmolLM2-135M, on its inputs in the dense model (16 x 512 tokens of the
calibration text of frontier.py): the squared error per rank that is saved between the ranks 0, 8, 16, 32 and 64, by
the curve and by whole runs of the refiner, 50 steps of TLR and accelerated TLR, all of JointADMM. An allocation needs
the order of these gains over all projections and ranks, each as a share of ||W||^2 in the metric (Spearman), and a
ratio, true / curve, that is everywhere the same (spread: the standard deviation of its logarithm). "Singular values"
are those of W - S, S as it was pruned.

Results: results/curves-cpu.json, and a table in docs/budgets.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from _cells import calibration_text, publish, spearman_of, table
from _common import ROOT, smollm2
from mendlm import NM, TLR, AcceleratedTLR, InputStats, JointADMM, Unstructured, refine
from mendlm.calibration.statistics import InputGatherer
from mendlm.curves import error_curve
from mendlm.metrics import make_metric
from mendlm.patterns import Pattern
from mendlm.refiners import AbstractRefiner
from mendlm.selection import select

PAGE = ROOT / "docs" / "budgets.md"
N_WINDOWS, SEQLEN = 16, 512
RANKS = (0, 8, 16, 32, 64)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """How weights are compressed."""

    criterion: str
    pattern: Pattern
    metric: str
    refiner: Callable[[int], AbstractRefiner]


SETTINGS = {
    "magnitude 50 %, TLR": Setting("magnitude", Unstructured(0.5), "plain", lambda rank: TLR(rank, n_iter=50)),
    "SparseGPT 2:4, accelerated, gram": Setting(
        "sparsegpt", NM(2, 4), "gram", lambda rank: AcceleratedTLR(rank, n_iter=50)
    ),
    "joint-admm 2:4": Setting("magnitude", NM(2, 4), "gram", JointADMM),
    "joint-admm 50 %": Setting("magnitude", Unstructured(0.5), "gram", JointADMM),
}


def weights_and_inputs(layers: set[int]) -> dict[str, tuple[Tensor, InputStats]]:
    """The projections of some layers, and what they see in the dense model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2())(calibration_text().read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: N_WINDOWS * SEQLEN]).view(N_WINDOWS, SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.") and int(name.split(".")[2]) in layers
    }
    gatherer = InputGatherer(linear, {name: m.in_features for name, m in linear.items()}, gram=True, device=CPU)
    with gatherer.watching():
        for batch in torch.split(windows, 2):
            model.model(input_ids=batch, use_cache=False)
            gatherer.batch_ends()
    return {name: (linear[name].weight.data, stats) for name, stats in gatherer.results().items()}


def measure(setting: Setting, W: Tensor, inputs: InputStats) -> dict[str, Any]:
    """Errors at `RANKS` by every curve and by whole runs, as shares of ||W||^2, and how long they took."""
    stats = None if setting.metric == "plain" else inputs
    metric = make_metric(setting.metric, stats, damping=0.01, dtype=W.dtype, device=CPU)
    found = select(W, setting.criterion, setting.pattern, inputs=inputs)
    S = W * found.mask if found.S is None else found.S
    how: dict[str, Any] = {"metric": metric, "pattern": setting.pattern, "inputs": stats}

    def curve() -> Sequence[float]:
        generator = torch.Generator().manual_seed(0)
        return error_curve(
            W, found.mask, setting.refiner(RANKS[1]), RANKS, start=found.S, generator=generator, **how
        ).errors

    def whole_runs() -> Sequence[float]:
        errors = []
        for rank in RANKS:
            generator = torch.Generator().manual_seed(0)
            out = refine(W, found.mask, setting.refiner(rank), start=found.S, generator=generator, **how)
            errors.append(metric.norm(W - out.S - out.B @ out.A) ** 2)
        return errors

    def singular_values() -> Sequence[float]:
        energies = torch.linalg.svdvals(metric.whiten(metric.scaled(W - S))).double().square().flip(0).cumsum(0).flip(0)
        return [float(energies[rank]) for rank in RANKS]

    row: dict[str, Any] = {}
    kinds: dict[str, Callable[[], Sequence[float]]] = {"true": whole_runs, "curve": curve}
    if not setting.refiner(RANKS[1]).moves_mask:  # one that does never sees this S
        kinds["singular_values"] = singular_values
    for name, run in kinds.items():
        start = time.perf_counter()
        errors = run()
        row[f"{name}_seconds"] = round(time.perf_counter() - start, 3)
        row[name] = [float(error) / float(metric.norm(W)) ** 2 for error in errors]
    return row


def gains(errors: Sequence[float]) -> list[float]:
    """The error saved per rank in every stretch."""
    widths = [b - a for a, b in pairwise(RANKS)]
    return [(a - b) / width for (a, b), width in zip(pairwise(errors), widths, strict=True)]


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for every setting and curve."""
    head = ["setting", "curve", "Spearman", "true / curve, geometric mean", "its spread", "by stretch", "cost"]
    lines = [head]
    for setting in SETTINGS:
        these = [row for row in rows if row["setting"] == setting]
        for kind in ("singular_values", "curve"):
            if not these or kind not in these[0]:
                continue
            pairs = [list(zip(gains(row["true"]), gains(row[kind]), strict=True)) for row in these]
            logs = [[math.log(true / max(found, 1e-12)) for true, found in pair] for pair in pairs]
            every = [log for row in logs for log in row]
            true, found = ([pair[i] for row in pairs for pair in row] for i in (0, 1))
            by_stretch = (f"{math.exp(statistics.fmean(column)):.2f}" for column in zip(*logs, strict=True))
            seconds, whole = (sum(row[f"{name}_seconds"] for row in these) for name in (kind, "true"))
            lines.append(
                [
                    setting,
                    "as measured" if kind == "curve" else "singular values",
                    f"{spearman_of(true, found):.3f}",
                    f"{math.exp(statistics.fmean(every)):.2f}",
                    f"{statistics.stdev(every):.2f}",
                    ", ".join(by_stretch),
                    f"1 / {whole / seconds:.0f}",
                ]
            )
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="0,1,15,28", help="separated by commas")
    layers = {int(part) for part in parser.parse_args().layers.split(",")}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        weights = weights_and_inputs(layers)
        for setting, how in SETTINGS.items():
            for name, (W, inputs) in weights.items():
                rows.append({"setting": setting, "projection": name, **measure(how, W, inputs)})
                print(json.dumps(rows[-1]), flush=True)
    publish("curves", PAGE, (__doc__ or "").split("\n\n")[2], rows, summary(rows))


if __name__ == "__main__":
    main()
