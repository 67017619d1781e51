"""Steps that AcceleratedTLR needs to reach the T = 50 objective of exact TLR, on every projection of SmolLM2.

    python benchmarks/acceleration.py [--layers 0:30] [--ranks 16 128]

Exact TLR takes about half an hour for all 210 tensors and both ranks on two cores; finished tensors are kept in
work/acceleration.jsonl, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json

from _common import ROOT, projections, report
from mendlm import TLR, AcceleratedTLR, Unstructured, refine, select_mask

JOURNAL = ROOT / "work" / "acceleration.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="0:30", help="range of blocks, first:last+1")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    first, last = map(int, options.layers.split(":"))
    JOURNAL.parent.mkdir(exist_ok=True)
    lines = JOURNAL.read_text().splitlines() if JOURNAL.exists() else []
    done = {(row["name"], row["k"]): row for row in map(json.loads, lines)}
    with JOURNAL.open("a") as journal:
        for name, weight in projections(range(first, last)).items():
            W = weight.to(options.device)
            mask = select_mask(W, "magnitude", Unstructured(0.5))
            for k in options.ranks:
                if (name, k) in done:
                    continue
                exact = refine(W, mask, TLR(k, solver="exact")).objective
                fast = refine(W, mask, AcceleratedTLR(k, n_iter=50, rtol=0))
                steps = next((t + 1 for t, p in enumerate(fast.trace) if p.objective <= exact), None)
                at_25 = min(p.objective for p in fast.trace[:25])
                subspace = refine(W, mask, TLR(k, solver="subspace")).objective
                row = {"name": name, "k": k, "steps": steps, "exact": exact, "at_25": at_25, "subspace": subspace}
                done[name, k] = row
                journal.write(json.dumps(row) + "\n")
                journal.flush()
                print(name, k, steps, f"{100 * (at_25 / exact - 1):+.2f} % after 25 steps", flush=True)
    rows = []
    for k in options.ranks:
        mine = [row for (_, rank), row in done.items() if rank == k]
        steps = sorted(51 if row["steps"] is None else row["steps"] for row in mine)
        excess = sorted(row["at_25"] / row["exact"] - 1 for row in mine)
        gaps = sorted(row["subspace"] / row["exact"] - 1 for row in mine)
        rows.append(
            {
                "k": k,
                "n_tensors": len(mine),
                "median_steps": steps[len(steps) // 2],
                "most_steps": steps[-1],
                "worst_after_25_percent": 100 * excess[-1],
                "median_after_25_percent": 100 * excess[len(excess) // 2],
                "subspace_worst_percent": 100 * gaps[-1],
                "subspace_median_percent": 100 * gaps[len(gaps) // 2],
            }
        )
    report("acceleration", options.device, rows, notes="51 steps = not reached within 50.")


if __name__ == "__main__":
    main()
