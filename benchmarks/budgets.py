"""Perplexity of SmolLM2-135M with budgeted ranks against uniform ones at equal bytes. Resumable.

    python benchmarks/budgets.py [--cells …] [--minutes 55] [--list]

Every cell is three processes that a user could type, `mendlm plan`, `mendlm compress` and `mendlm eval`; its result
goes to work/budgets.jsonl at once, and all of them to results/budgets-cpu.json, which a fresh clone goes on from, and
to docs/budgets.md. Error curves are kept in work/, so that another objective costs seconds.

Protocol: that of quality.py, 8 windows. "uniform" has rank 16 everywhere, and its cells are those of quality.py where
that has measured them; the others have factors of at most the same bytes, "3.6 %" and "3 %" of those in place of 4.6 %
of the dense bytes of the projections.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from _cells import calibration_text, run, shown
from _common import ROOT, environment, smollm2, wikitext
from quality import cells_done

DONE = ROOT / "work" / "budgets.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "budgets-cpu.json"
PAGE = ROOT / "docs" / "budgets.md"
# Factors of rank 16 in every projection take this share of the dense bytes of the projections.
SHARE = "0.046007"
FEWER = {"3.6 %": "0.036", "3 %": "0.03"}

# setting -> flags, and the cell of quality.py that has the same with rank 16
SETTINGS: dict[str, tuple[list[str], tuple[str, str, str]]] = {
    "magnitude 50 %, TLR": (
        ["--criterion", "magnitude", "--sparsity", "0.5", "--scope", "tensor", "--refiner", "tlr", "--metric", "plain"],
        ("magnitude", "50 %", "TLR"),
    ),
    "magnitude 2:4, TLR": (
        ["--criterion", "magnitude", "--pattern", "2:4", "--refiner", "tlr", "--metric", "plain"],
        ("magnitude", "2:4", "TLR"),
    ),
    "SparseGPT 2:4, accelerated, gram": (
        ["--criterion", "sparsegpt", "--pattern", "2:4", "--refiner", "accelerated-tlr", "--metric", "gram"],
        ("SparseGPT", "2:4", "accelerated, gram, sequential"),
    ),
}
CHOICES: dict[str, list[str]] = {
    "uniform": ["--rank", "16"],
    "relative": ["--target-rank-bytes", SHARE, "--objective", "relative"],
    **{f"relative, {s}": ["--target-rank-bytes", value, "--objective", "relative"] for s, value in FEWER.items()},
    "parameters": ["--target-rank-bytes", SHARE, "--objective", "parameters"],
    "absolute": ["--target-rank-bytes", SHARE, "--objective", "absolute"],
}
FIRST, SECOND, LAST = SETTINGS
CELLS = [
    *((FIRST, choice) for choice in ("uniform", "relative")),
    *((LAST, choice) for choice in ("uniform", "relative")),
    *((FIRST, choice) for choice in ("parameters", "absolute")),
    *((SECOND, choice) for choice in ("uniform", "relative")),
    *((LAST, choice) for choice in ("parameters", "absolute", "relative, 3 %", "relative, 3.6 %")),
]


def flags_of(setting: str) -> list[str]:
    """The flags that plan and compress share."""
    flags = list(SETTINGS[setting][0])
    if "gram" in flags:
        flags += ["--calibration", str(calibration_text()), "--windows", "leading"]
        flags += ["--n-sequences", "16", "--seqlen", "1024", "--propagate", "sequential"]
    return flags


def measure(setting: str, choice: str) -> dict[str, Any]:
    """One cell."""
    row: dict[str, Any] = {"setting": setting, "choice": choice, "flags": shown([*flags_of(setting), *CHOICES[choice]])}
    if choice == "uniform":
        found = cells_done().done.get(SETTINGS[setting][1])
        if found is not None:
            return row | {"ppl": found["ppl"], "ratio": found["ratio"], "from": "quality-cpu.json"}
    # Folders of its own for every cell: two of these scripts may run at a time.
    cell = f"budgets-{list(SETTINGS).index(setting)}-{list(CHOICES).index(choice)}"
    model, out, recipe = str(smollm2()), ROOT / "work" / cell, ROOT / "work" / f"{cell}.yaml"
    how = [*flags_of(setting), *CHOICES[choice]]
    if choice != "uniform":
        curves = ROOT / "work" / f"curves-{list(SETTINGS).index(setting)}.json"
        files = ["--curves", str(curves), "--output", str(recipe), "--overwrite"]
        planned, seconds = run("plan", model, *how, *files)
        row |= {"plan_seconds": round(seconds, 1), "error": planned["error"], "uniform": planned["uniform"]}
        row["ranks"] = {tensor["name"]: tensor["rank"] for tensor in planned["tensors"]}
        how = ["--recipe", str(recipe)]
    result, seconds = run("compress", model, str(out), *how, "--overwrite")
    ppl = run("eval", str(out), "--text", str(wikitext()), "--n-windows", "8")[0]["ppl"]
    return row | {"ppl": ppl, "ratio": result["totals"]["ratio"], "compress_seconds": round(seconds, 1)}


def done() -> dict[tuple[str, str], dict[str, Any]]:
    """Cells measured so far; one whose flags have changed since counts as not measured."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows += [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []
    cells = {(row["setting"], row["choice"]): row for row in rows}
    return {
        key: row
        for key, row in cells.items()
        if key in CELLS and row["flags"] == shown([*flags_of(key[0]), *CHOICES[key[1]]])
    }


def write(results: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The JSON, and the table of the page."""
    rows = [results[cell] for cell in CELLS if cell in results]
    lines = ["| setting | ranks | bytes | perplexity |", "| --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (list(SETTINGS).index(row["setting"]), list(CHOICES).index(row["choice"]))):
        ranks = "rank 16 everywhere" if row["choice"] == "uniform" else f"`{row['choice']}`"
        lines.append(f"| {row['setting']} | {ranks} | {100 * row['ratio']:.2f} % | {row['ppl']:.2f} |")
    table = "\n".join(lines)
    print(f"\n{table}")
    before, _, tail = PAGE.read_text(encoding="utf-8").partition("<!-- budgets -->\n")
    PAGE.write_text(f"{before}<!-- budgets -->\n{table}\n{tail[tail.index('<!-- end -->') :]}", encoding="utf-8")
    protocol = (__doc__ or "").split("Protocol: ")[1]
    document = {"benchmark": "budgets", "environment": environment("cpu"), "protocol": protocol, "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", metavar="SETTING/CHOICE", help="only these, as --list shows them")
    parser.add_argument("--minutes", type=float, default=55.0, help="start no new cell after this")
    parser.add_argument("--list", action="store_true", help="show what is done and what is not, and stop")
    options = parser.parse_args()
    results = done()
    wanted = [cell for cell in CELLS if options.cells is None or "/".join(cell) in options.cells]
    if options.list:
        print(*(f"{'done' if cell in results else 'open'}  {'/'.join(cell)}" for cell in wanted), sep="\n")
        return
    DONE.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    for cell in wanted:
        if cell in results:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            print("out of time; run again to go on")
            break
        results[cell] = measure(*cell)
        with DONE.open("a") as file:
            file.write(json.dumps(results[cell]) + "\n")
        print(f"{'/'.join(cell)}: {results[cell]['ppl']:.2f}", flush=True)
        write(results)
    write(results)


if __name__ == "__main__":
    main()
