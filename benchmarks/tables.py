"""Fill the tables of docs/benchmarks.md from benchmarks/results/, between the markers <!-- NAME --> and <!-- end -->.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from typing import Any

from _common import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"


def rows(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def table(columns: list[str], lines: list[list[str]]) -> str:
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(cells) for cells in lines)])


def solvers() -> str:
    columns = ["layer", "k", "refiner", "exact, s", "this, s", "times faster", "objective against exact"]
    lines = [
        [
            *(r["layer"], str(r["k"]), r["refiner"], f"{r['exact_seconds']:.2f}", f"{r['seconds']:.3f}"),
            *(f"{r['speedup']:.0f}", f"{r['objective_excess_percent']:+.2f} %"),
        ]
        for r in rows("solvers-cpu")
    ]
    return table(columns, lines)


def large() -> str:
    (r,) = rows("large-matrix-cpu")
    facts = {
        "exact TLR (51 SVDs, one timed)": f"{r['exact_seconds_scaled']:.0f} s",
        "TLR, subspace": f"{r['tlr_seconds']:.2f} s, {r['speedup']:.0f} times faster",
        "its bare matrix products alone": f"{r['bare_products_seconds']:.2f} s",
        "TLR / bare products": f"{r['times_bare_products']:.2f}",
        "accelerated TLR, 25 steps": f"{r['accelerated_25_seconds']:.2f} s",
        "choosing the mask": f"{r['mask_seconds']:.3f} s",
    }
    return table(["what", "time"], [[what, time] for what, time in facts.items()])


def acceleration() -> str:
    columns = ["k", "tensors", "steps, median", "steps, most", "after 25 steps, worst", "subspace TLR, worst", "median"]
    lines = [
        [
            *(str(r["k"]), str(r["n_tensors"]), str(r["median_steps"]), str(r["most_steps"])),
            f"{r['worst_after_25_percent']:+.2f} %",
            *(f"{r['subspace_worst_percent']:+.2f} %", f"{r['subspace_median_percent']:+.2f} %"),
        ]
        for r in rows("acceleration-cpu")
    ]
    return table(columns, lines)


def model() -> str:
    lines = []
    for r in rows("model-cpu"):
        made = [f"{r['seconds']:.0f}", f"{r['peak_rss_mb']:.0f}"] if r["recipe"] != "dense" else ["", ""]
        ppl = f"{r['ppl']:.2f}" if r["ppl"] < 1000 else f"{r['ppl']:.0f}"
        lines.append([r["mask"], r["recipe"], ppl, f"{r['stored_mb']:.0f}", *made])
    return table(["mask", "recipe", "perplexity", "MB stored", "seconds", "peak MB"], lines)


def main() -> None:
    text = PAGE.read_text()
    for make in (solvers, large, acceleration, model):
        if rows({"large": "large-matrix"}.get(make.__name__, make.__name__) + "-cpu"):
            block = f"<!-- {make.__name__} -->\n{make()}\n<!-- end -->"
            text, n = re.subn(rf"<!-- {make.__name__} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
            print(f"{make.__name__}: {n} table")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
