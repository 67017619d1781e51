"""Perplexity of SmolLM2-135M by mask and by how it is mended; rank 16. Resumable: cells that are done are kept.

    python benchmarks/quality.py [--rows …] [--columns …] [--minutes 55] [--list]

Every cell is two processes that a user could type, `mendlm compress` and `mendlm eval`; its result goes to
work/quality.jsonl at once; results/quality-cpu.json, which a fresh clone goes on from, and docs/quality.md are written
from it at the end.

Protocol: float32; WikiText-2 raw test split joined with blank lines, its first 8 windows of 2048 tokens, no BOS.
Calibration: the first 16 windows of 1024 tokens of the tokenised WikiText-2 validation split, `<unk>` read as "the";
"self": 16 windows of 1024 tokens that the model wrote itself. All linear layers of the blocks, not the embedding.
Unless a column says "sequential", every block is calibrated on the activations of the dense model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import ROOT, environment, smollm2, wikitext

DONE = ROOT / "work" / "quality.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "quality-cpu.json"
PAGE = ROOT / "docs" / "quality.md"
SPARSITIES = {"50 %": ["--sparsity", "0.5"], "2:4": ["--pattern", "2:4"]}
RANK = ["--rank", "16"]

# criterion -> flags
MASKS: dict[str, list[str]] = {
    "magnitude": ["--criterion", "magnitude"],
    "Wanda": ["--criterion", "wanda"],
    "RIA": ["--criterion", "ria"],
    "SparseGPT": ["--criterion", "sparsegpt"],
    "Wanda, self": ["--criterion", "wanda", "--calibration", "self"],
    "SparseGPT, self": ["--criterion", "sparsegpt", "--calibration", "self"],
}
DENSE, SEQUENTIAL = ["--propagate", "dense"], ["--propagate", "sequential"]

# column -> flags; those that look at the calibration text come after "diagonal"
COLUMNS: dict[str, list[str]] = {
    "only pruned": ["--refiner", "none"],
    "zero-shot SVD": ["--refiner", "zero-shot-svd", "--metric", "plain", *RANK],
    "PCP": ["--refiner", "pcp", "--metric", "plain", *RANK],
    "TLR": ["--refiner", "tlr", "--metric", "plain", *RANK],
    "accelerated": ["--refiner", "accelerated-tlr", "--metric", "plain", *RANK],
    "TLR, diagonal": ["--refiner", "tlr", "--metric", "diagonal", *RANK],
    "accelerated, diagonal": ["--refiner", "accelerated-tlr", "--metric", "diagonal", *RANK],
    "TLR, gram": ["--refiner", "tlr", "--metric", "gram", *RANK],
    "accelerated, gram": ["--refiner", "accelerated-tlr", "--metric", "gram", *RANK],
    "TLR, gram, sequential": ["--refiner", "tlr", "--metric", "gram", *RANK],
    "accelerated, gram, sequential": ["--refiner", "accelerated-tlr", "--metric", "gram", *RANK],
    "OATS": ["--refiner", "oats", "--metric", "diagonal", *RANK],
}
DATA_FREE = ("only pruned", "zero-shot SVD", "PCP", "TLR", "accelerated")

# Figures of a prototype with the same protocol, to be reproduced; Wanda and magnitude masks.
REFERENCE = {
    ("magnitude", "50 %"): (489.7, 220.9, 179.0, 186.2, 53.91),
    ("magnitude", "2:4"): (1328.9, 814.8, 644.2, 746.0, 123.6),
    ("Wanda", "50 %"): (40.55, 37.62, 35.11, 34.52, 34.66),
    ("Wanda", "2:4"): (152.4, 120.3, 93.59, 92.97, 91.00),
}
REFERENCE_COLUMNS = ("only pruned", "zero-shot SVD", "TLR", "accelerated", "accelerated, diagonal")


def calibration_text() -> Path:
    """The validation split with `<unk>` read as "the", as one text."""
    target = ROOT / "work" / "calibration.txt"
    if not target.exists():
        source = ROOT.parent / "shared" / "data" / "wikitext-2-v1" / "valid.txt.gz"
        if not source.exists():
            sys.exit(f"the calibration text {source.name} is not at hand; figures of other texts do not compare")
        target.parent.mkdir(exist_ok=True)
        target.write_text(gzip.open(source, "rt", encoding="utf-8").read().replace("<unk>", "the"), encoding="utf-8")
    return target


def flags_of(mask: str, sparsity: str, column: str) -> list[str]:
    """The flags of a cell."""
    flags = [*MASKS[mask], *SPARSITIES[sparsity]]
    if mask == "magnitude" and sparsity == "50 %":
        flags += ["--scope", "tensor"]
    if column == "zero-shot SVD":
        flags += ["--recipe", str(ROOT / "benchmarks" / "recipes" / "zero-shot-published.yaml")]
    if mask != "magnitude" or column not in DATA_FREE:
        if "--calibration" not in flags:
            flags += ["--calibration", str(calibration_text()), "--windows", "leading"]
        flags += ["--n-sequences", "16", "--seqlen", "1024"]
        flags += SEQUENTIAL if column.endswith("sequential") else DENSE
    return [*flags, *COLUMNS[column]]


def cells() -> list[tuple[str, str, str]]:
    """(mask, sparsity, column) of every cell, the reference's first."""
    reference = [(m, s, c) for (m, s) in REFERENCE for c in REFERENCE_COLUMNS]
    best = "accelerated, gram, sequential"
    more = [
        *((m, s, best) for m, s in (("SparseGPT", "2:4"), ("Wanda", "2:4"), ("SparseGPT", "50 %"), ("Wanda", "50 %"))),
        *((m, s, "only pruned") for m in ("SparseGPT", "RIA", "Wanda, self") for s in SPARSITIES),
        *(("Wanda", s, "OATS") for s in SPARSITIES),
        *((m, s, best) for m in ("SparseGPT, self", "magnitude") for s in SPARSITIES),
        *((m, s, "TLR, gram") for m, s in REFERENCE),
        *((m, s, "TLR") for m in ("RIA", "Wanda, self") for s in SPARSITIES),
        *(("SparseGPT", s, c) for c in ("zero-shot SVD", "TLR, gram") for s in SPARSITIES),
        *((m, s, c) for c in ("TLR, diagonal", "accelerated, gram") for m, s in REFERENCE),
        *((m, s, best) for m in ("RIA", "Wanda, self") for s in SPARSITIES),
        *((m, s, "TLR, gram, sequential") for m, s in REFERENCE),
        *((m, s, "PCP") for m, s in REFERENCE),
    ]
    return [*reference, *more]


def done() -> dict[tuple[str, ...], dict[str, Any]]:
    """Cells measured so far; a cell whose flags have changed since counts as not measured."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows += [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    return {(r["mask"], r["sparsity"], r["column"]): r for r in rows if r["flags"] == shown(flags_of_row(r))}


def flags_of_row(row: dict[str, Any]) -> list[str]:
    if row["mask"] == "dense":
        return []
    return flags_of(row["mask"], row["sparsity"], row["column"])


def shown(flags: list[str]) -> list[str]:
    """Flags without the folders of this machine."""
    return [flag.rpartition("/")[2] for flag in flags]


def run(*arguments: str) -> tuple[dict[str, Any], float]:
    """JSON output and wall seconds of one `mendlm` process."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "mendlm", *arguments, "--json"],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        sys.exit(f"mendlm {' '.join(arguments)} failed: {process.stderr[-2000:]}")
    return json.loads(process.stdout), time.perf_counter() - start


def measure(mask: str, sparsity: str, column: str) -> dict[str, Any]:
    """Compress and evaluate one cell."""
    model, row = smollm2(), {"mask": mask, "sparsity": sparsity, "column": column}
    evaluation = ["--text", str(wikitext()), "--n-windows", "8"]
    if mask == "dense":
        return row | {"flags": [], "ppl": run("eval", str(model), *evaluation)[0]["ppl"]}
    out, flags = ROOT / "work" / "quality-cell", flags_of(mask, sparsity, column)
    result, seconds = run("compress", str(model), str(out), *flags, "--overwrite")
    peak = json.loads((out / "mendlm.run.json").read_text())["peak_memory_bytes"]
    ppl = run("eval", str(out), *evaluation)[0]["ppl"]
    facts = {"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6), "ratio": result["totals"]["ratio"]}
    return row | {"flags": shown(flags), "ppl": ppl} | facts


def markdown(results: dict[tuple[str, ...], dict[str, Any]]) -> str:
    """Masks down, columns across; the prototype's figure in parentheses."""
    columns = [c for c in COLUMNS if any(key[2] == c for key in results)]
    rows = [(m, s) for m in MASKS for s in SPARSITIES if any(key[:2] == (m, s) for key in results)]
    lines = [["mask", *columns], ["---"] * (len(columns) + 1)]
    for mask, sparsity in rows:
        line = [f"{mask} {sparsity}"]
        for column in columns:
            cell = results.get((mask, sparsity, column))
            text = "" if cell is None else f"{cell['ppl']:.2f}"
            if cell is not None and column in REFERENCE_COLUMNS and (mask, sparsity) in REFERENCE:
                text += f" ({REFERENCE[mask, sparsity][REFERENCE_COLUMNS.index(column)]:g})"
            line.append(text)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """The JSON and the page."""
    dense = results.get(("dense", "", ""))
    rest = {key: row for key, row in results.items() if key[0] != "dense"}
    table = markdown(rest)
    print(f"\ndense: {dense['ppl']:.2f}\n\n{table}" if dense else table)
    document = {
        "benchmark": "quality",
        "environment": environment("cpu"),
        "protocol": (__doc__ or "").split("Protocol: ")[1],
        "rows": list(results.values()),
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    if PAGE.exists() and dense:
        text = PAGE.read_text(encoding="utf-8")
        before, found, tail = text.partition("<!-- quality -->\n")
        if found:
            after = tail[tail.index("<!-- end -->") :]
            PAGE.write_text(f"{before}{found}Dense: {dense['ppl']:.2f}.\n\n{table}\n{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", choices=list(MASKS), default=list(MASKS))
    parser.add_argument("--sparsities", nargs="+", choices=list(SPARSITIES), default=list(SPARSITIES))
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--minutes", type=float, default=55.0, help="start no new cell after this")
    parser.add_argument("--list", action="store_true", help="show what is done and what is not, and stop")
    options = parser.parse_args()
    wanted = [c for c in cells() if c[0] in options.masks and c[1] in options.sparsities and c[2] in options.columns]
    results = done()
    missing = [cell for cell in [("dense", "", ""), *wanted] if cell not in results]
    if options.list:
        print(f"{len(results)} cells done, missing: {missing}")
        return
    DONE.parent.mkdir(exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for number, cell in enumerate(missing, start=1):
        if time.monotonic() > end:
            print(f"{len(missing) - number + 1} cells are left; run again to go on")
            break
        row = measure(*cell)
        with DONE.open("a") as file:
            file.write(json.dumps(row) + "\n")
        results[cell] = row
        print(f"[{number}/{len(missing)}]", {k: v for k, v in row.items() if k != "flags"}, flush=True)
    write(results)


if __name__ == "__main__":
    main()
