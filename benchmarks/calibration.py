"""What a calibrated run of SmolLM2-135M costs beyond its forward passes and its solver, and that memory stays flat.

    python benchmarks/calibration.py [--n-sequences 16] [--seqlen 1024] [--repeats 3]

Wanda + TLR, 50 %, rank 16, sequential: every block runs twice over the text, to gather and to propagate. Bare forward
passes are the same block forwards, on the same batches, with nothing else; solver seconds are those of the tensors
(mask, refinement, packing, writing), as mendlm.run.json has them. The rest is overhead: reading weights, the skeleton
of the model, tokens, statistics, bookkeeping. Medians of the repeats.
Memory: `mendlm compress` of random models of 8 and of 32 equal blocks in processes of their own, kernel's peak
(VmHWM), medians of three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import mendlm
from _common import ROOT, report, smollm2
from mendlm import TLR, Recipe, Unstructured
from mendlm.calibration.blocks import BlockModel
from mendlm.calibration.walk import CalibrationText, Walk
from mendlm.checkpoints.reader import open_checkpoint
from mendlm.config import Calibration
from quality import calibration_text

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=int(sys.argv[2]),
    num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""


def bare_forward_seconds(n_sequences: int, seqlen: int, batch_size: int) -> float:
    """Two forward passes of every block over random tokens, without reading weights."""
    model = BlockModel(open_checkpoint(smollm2()), torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 49152, (n_sequences, seqlen), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, CalibrationText(ids, batch_size), lambda index, phase: None)
    total = 0.0
    for index in range(model.n_blocks):
        with model.loaded(index) as block:
            start = time.perf_counter()
            for _ in range(2):
                walk.propagate(index, block)
            total += time.perf_counter() - start
    return total


def compress_once(calibration: Calibration) -> tuple[float, float]:
    """Wall seconds and solver seconds of one run."""
    out = ROOT / "work" / "calibration-run"
    recipe = Recipe(
        criterion="wanda",
        pattern=Unstructured(0.5, "row"),
        refiner=TLR(rank=16),
        metric="plain",
        calibration=calibration,
    )
    start = time.perf_counter()
    mendlm.compress(smollm2(), out, recipe, overwrite=True)
    wall = time.perf_counter() - start
    return wall, sum(json.loads((out / "mendlm.run.json").read_text())["tensor_seconds"].values())


def peak_mb(n_blocks: int) -> float:
    """Peak memory of a calibrated run of a random model, Gram matrices included."""
    model, out = ROOT / "work" / f"random-{n_blocks}", ROOT / "work" / f"random-{n_blocks}-out"
    subprocess.run([sys.executable, "-c", MAKE, str(model), str(n_blocks)], check=True)
    flags = ["--calibration", "random-tokens", "--n-sequences", "8", "--seqlen", "256", "--overwrite", "--json"]
    more = ["--criterion", "sparsegpt", "--refiner", "none"]
    command = [sys.executable, "-m", "mendlm", "compress", str(model), str(out), *flags, *more]
    peaks = []
    for _ in range(3):  # what the allocator keeps differs by a tenth from run to run
        subprocess.run(command, check=True, capture_output=True)
        peaks.append(json.loads((out / "mendlm.run.json").read_text())["peak_memory_bytes"] / 1e6)
    return statistics.median(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-sequences", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    calibration = Calibration(
        source=str(calibration_text()), n_sequences=options.n_sequences, seqlen=options.seqlen, windows="leading"
    )
    rows: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        wall, solver = compress_once(calibration)
        forward = bare_forward_seconds(options.n_sequences, options.seqlen, calibration.batch_size)
        rows.append({"seconds": wall, "solver": solver, "forward": forward})
        print(rows[-1], flush=True)
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    overhead = statistics.median(r["seconds"] / (r["solver"] + r["forward"]) - 1 for r in rows)
    peaks = {f"peak_mb_{n}_blocks": peak_mb(n) for n in (8, 32)}
    notes = f"Wanda + TLR, 50 %, rank 16, {options.n_sequences} x {options.seqlen} tokens, sequential"
    report("calibration", "cpu", [middle | {"overhead_percent": 100 * overhead} | peaks], notes)


if __name__ == "__main__":
    main()
