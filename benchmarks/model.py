"""All of SmolLM2-135M: seconds and peak memory of `mendlm compress`, and the perplexity of what comes out.

    python benchmarks/model.py [--n-windows 8] [--skip-perplexity]

Every run is a process of its own, the command line a user types; its peak resident memory is the kernel's figure
(VmHWM), as mendlm.run.json records it.
Protocol of the perplexities: float32, WikiText-2 raw test split joined with blank lines, the first windows of 2048
tokens, no BOS. Masks: magnitude, 50 %, per tensor, and 2:4; k = 16, T = 50.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from _common import ROOT, report, smollm2, wikitext

RECIPES: dict[str, list[str]] = {
    "only pruned": ["--refiner", "none"],
    "zero-shot SVD, as published": ["--recipe", str(ROOT / "benchmarks" / "recipes" / "zero-shot-published.yaml")],
    "zero-shot SVD, S refitted": ["--refiner", "zero-shot-svd", "--rank", "16"],
    "TLR": ["--refiner", "tlr", "--rank", "16"],
    "TLR, exact": ["--refiner", "tlr", "--rank", "16", "--solver", "exact"],
    "accelerated TLR": ["--refiner", "accelerated-tlr", "--rank", "16"],
}
MASKS: dict[str, list[str]] = {
    "magnitude 50 %": ["--sparsity", "0.5", "--scope", "tensor"],
    "magnitude 2:4": ["--pattern", "2:4"],
}


def run(*arguments: str) -> tuple[dict[str, Any], float]:
    """JSON output and wall seconds of one `mendlm` process."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "mendlm", *arguments, "--json"], stdout=subprocess.PIPE)
    if process.returncode:
        sys.exit(f"mendlm {' '.join(arguments)} failed with exit code {process.returncode}")
    return json.loads(process.stdout), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-windows", type=int, default=8)
    parser.add_argument("--skip-perplexity", action="store_true")
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    default = [name for name in RECIPES if name != "TLR, exact"]  # that one takes ten minutes a mask
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=default)
    options = parser.parse_args()
    model = smollm2()
    evaluation = [] if options.skip_perplexity else ["--text", str(wikitext()), "--n-windows", str(options.n_windows)]
    rows: list[dict[str, Any]] = []

    def measure(mask: str, recipe: str, folder: str, seconds: float, peak_mb: float, stored_bytes: int) -> None:
        row: dict[str, Any] = {"mask": mask, "recipe": recipe, "seconds": seconds, "peak_rss_mb": peak_mb}
        row["stored_mb"] = stored_bytes / 1e6
        if evaluation:
            row["ppl"] = run("eval", folder, *evaluation)[0]["ppl"]
        rows.append(row)
        print(row, flush=True)

    measure("none", "dense", str(model), 0.0, 0.0, (model / "model.safetensors").stat().st_size)
    for mask in options.masks:
        for recipe in options.recipes:
            out = ROOT / "work" / "bench-model"
            arguments = ["compress", str(model), str(out), *MASKS[mask], *RECIPES[recipe], "--overwrite"]
            result, seconds = run(*arguments)
            peak_mb = json.loads((out / "mendlm.run.json").read_text())["peak_memory_bytes"] / 1e6
            measure(mask, recipe, str(out), seconds, peak_mb, result["totals"]["stored_bytes"])
    notes = (
        "" if options.skip_perplexity else f"{options.n_windows} windows of 2048 tokens, WikiText-2 raw test, float32"
    )
    report("model", "cpu", rows, notes)


if __name__ == "__main__":
    main()
