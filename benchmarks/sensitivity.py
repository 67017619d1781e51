"""What an error in one weight does to the model, against what plans count it as. About 20 minutes of one thread.

    python benchmarks/sensitivity.py [--layers 0,3,6,…]

For every projection of some layers of SmolLM2-135M: the weight alone is pruned (SparseGPT, 2:4, 8 x 1024 tokens of the
calibration text of frontier.py, all of it dense before), and three numbers are taken: KL, the mean Kullback-Leibler
divergence of the next token's distribution on the first 2 windows; the squared relative change of the block's output on
all 8, what objective "block" counts; and the squared relative error of the weight in the Gram metric, what "relative"
counts. A good measure has KL in proportion to it: the spread of the ratio is the standard deviation of its logarithm.

Results: results/sensitivity-cpu.json, and a table in docs/budgets.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _cells import calibration_text, publish, spearman_of, table
from _common import ROOT, smollm2
from mendlm import NM
from mendlm.calibration.outputs import output_error
from mendlm.calibration.statistics import InputGatherer
from mendlm.selection import select

PAGE = ROOT / "docs" / "budgets.md"
N_WINDOWS, N_KL_WINDOWS, SEQLEN = 8, 2, 1024
CPU = torch.device("cpu")


class Recorder:
    """What a block is called with beside the hidden states, taken from a run of the whole model."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.kwargs: dict[str, Any] = {}
        self.inputs: list[Tensor] = []
        hook = model.model.layers[0].register_forward_pre_hook(self._take, with_kwargs=True)
        for batch in torch.split(ids, N_KL_WINDOWS):
            model.model(input_ids=batch, use_cache=False)
        hook.remove()

    def _take(self, block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(args[0].clone())
        self.kwargs = kwargs

    def forward(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Output of a block, or of what is called like it."""
        out = block(hidden, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def measure(layers: set[int]) -> list[dict[str, Any]]:
    """A row for every projection of `layers`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2())(calibration_text().read_text(encoding="utf-8"))["input_ids"]
    ids = torch.tensor(ids[: N_WINDOWS * SEQLEN]).view(N_WINDOWS, SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    blocks = model.model.layers
    recorder = Recorder(model, ids)
    run = recorder.forward

    def log_probs(index: int, hidden: Tensor) -> Tensor:
        for block in blocks[index:]:
            hidden = run(block, hidden)
        return torch.log_softmax(model.lm_head(model.model.norm(hidden)), dim=-1)

    dense = log_probs(0, recorder.inputs[0])
    states, rows = recorder.inputs, []
    for index, block in enumerate(blocks):
        linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        gatherer = InputGatherer(linear, {name: m.in_features for name, m in linear.items()}, gram=True, device=CPU)
        outputs = []
        with gatherer.watching():
            for hidden in states:
                outputs.append(run(block, hidden))
                gatherer.batch_ends()
        for name, stats in gatherer.results().items() if index in layers else ():
            W = linear[name].weight.data
            S = select(W, "sparsegpt", NM(2, 4), inputs=stats).S
            if S is None or stats.gram is None:
                raise AssertionError("SparseGPT changes the weights that it keeps, and a Gram matrix was gathered")
            gram = stats.gram
            error, energy = (float(((E @ gram) * E).sum()) for E in ((W - S).double(), W.double()))
            pruned = {f"{name}.weight": S}
            change = output_error(block, run, pruned, zip(states, outputs, strict=True), CPU)
            linear[name].weight.data = S
            found = log_probs(index, states[0])
            linear[name].weight.data = W
            kl = float((dense.exp() * (dense - found)).sum(-1).mean())
            rows.append({"layer": index, "projection": name, "kl": kl, "block": change, "relative": error / energy})
            print(json.dumps(rows[-1]), flush=True)
        states = outputs
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """KL against both measures."""
    lines = [["counted as", "KL / it, geometric mean", "spread", "lowest, highest", "Spearman"]]
    for measure_of in ("block", "relative"):
        logs = [math.log(row["kl"] / row[measure_of]) for row in rows]
        mean, spread = math.exp(statistics.fmean(logs)), statistics.stdev(logs)
        low, high = math.exp(min(logs)), math.exp(max(logs))
        spearman = spearman_of([r["kl"] for r in rows], [r[measure_of] for r in rows])
        lines.append([f"`{measure_of}`", f"{mean:.3g}", f"{spread:.2f}", f"{low:.3g}, {high:.3g}", f"{spearman:.2f}"])
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=",".join(map(str, range(0, 30, 3))), help="separated by commas")
    layers = {int(part) for part in parser.parse_args().layers.split(",")}
    with torch.no_grad():
        rows = measure(layers)
    publish("sensitivity", PAGE, (__doc__ or "").split("\n\n")[2], rows, summary(rows))


if __name__ == "__main__":
    main()
