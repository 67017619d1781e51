"""Perplexity of SmolLM2-135M with budgeted ranks and sparsities against uniform ones at equal bytes. Resumable.

    python benchmarks/budgets.py [--cells …] [--minutes 55] [--list]

Every cell is three processes that a user could type, `mendlm plan`, `mendlm compress` and `mendlm eval`; its result
goes to work/budgets.jsonl at once, and all of them to results/budgets-cpu.json, which a fresh clone goes on from, and
to docs/budgets.md. Error curves are kept in work/, so that another objective costs seconds.

Protocol: that of quality.py, 8 windows, and with joint-admm and best that of frontier.py, which has 32 windows of
calibration text in place of 16. "uniform" has rank 16 everywhere, and its cells are those of quality.py or frontier.py
where these have measured them; the others have factors of at most the same bytes, or of the share of the dense bytes of
the projections that is said, in place of 4.6 %; "sparsities too": the whole checkpoint has at most the bytes of
"uniform", and every projection a sparsity of 30, 40, 50, 60 or 70 %.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

import frontier
import quality
from _cells import calibration_text, publish, run, shown, table
from _common import ROOT, smollm2, wikitext

DONE = ROOT / "work" / "budgets.jsonl"
RESULTS = ROOT / "benchmarks" / "results" / "budgets-cpu.json"
PAGE = ROOT / "docs" / "budgets.md"
# Factors of rank 16 in every projection take this share of the dense bytes of the projections.
SHARE = "0.046007"
# Smaller shares.
FEWER_BY_BLOCK = {"2 %": "0.02", "1 %": "0.01"}
FEWER = {"3.6 %": "0.036", "3 %": "0.03"}
# As "uniform" at 50 % and at 2:4, rounded up.
WHOLE = "0.66634266"
GRAM = ["--refiner", "accelerated-tlr", "--metric", "gram"]
JOINT = ["--refiner", "joint-admm"]

# setting -> flags, and the cell of quality.py or frontier.py that has the same with rank 16
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
        ["--criterion", "sparsegpt", "--pattern", "2:4", *GRAM],
        ("SparseGPT", "2:4", "accelerated, gram, sequential"),
    ),
    "SparseGPT 50 %, accelerated, gram": (
        ["--criterion", "sparsegpt", "--sparsity", "0.5", *GRAM],
        ("SparseGPT", "50 %", "accelerated, gram, sequential"),
    ),
    "joint-admm 2:4": (["--criterion", "magnitude", "--pattern", "2:4", *JOINT], ("JointADMM", "2:4", "16")),
    "joint-admm 50 %": (["--criterion", "magnitude", "--sparsity", "0.5", *JOINT], ("JointADMM", "50 %", "16")),
    "best 2:4": (["--preset", "best", "--pattern", "2:4"], ("best", "2:4", "16")),
    "best 50 %": (["--preset", "best", "--sparsity", "0.5"], ("best", "50 %", "16")),
}
CHOICES: dict[str, list[str]] = {
    "uniform": ["--rank", "16"],
    "block": ["--target-rank-bytes", SHARE, "--objective", "block"],
    **{f"block, {s}": ["--target-rank-bytes", value, "--objective", "block"] for s, value in FEWER_BY_BLOCK.items()},
    "block, sparsities too": ["--target-bytes", WHOLE, "--sparsities", "0.3,0.4,0.6,0.7", "--objective", "block"],
    "relative": ["--target-rank-bytes", SHARE, "--objective", "relative"],
    **{f"relative, {s}": ["--target-rank-bytes", value, "--objective", "relative"] for s, value in FEWER.items()},
    "parameters": ["--target-rank-bytes", SHARE, "--objective", "parameters"],
    "absolute": ["--target-rank-bytes", SHARE, "--objective", "absolute"],
}
PLAIN_50, PLAIN_24, GRAM_24, GRAM_50, JOINT_24, JOINT_50, BEST_24, BEST_50 = SETTINGS
CELLS = [
    *((PLAIN_50, choice) for choice in ("uniform", "relative", "parameters", "absolute")),
    *((PLAIN_24, choice) for choice in ("uniform", "relative")),
    *((JOINT_50, choice) for choice in ("uniform", "block, sparsities too", "block", "relative")),
    *((BEST_50, choice) for choice in ("uniform", "block, sparsities too")),
    *((JOINT_24, choice) for choice in ("uniform", "block", "relative")),
    *((BEST_24, choice) for choice in ("uniform", "block")),
    *((GRAM_50, choice) for choice in ("uniform", "block", "relative", "block, sparsities too")),
    *((GRAM_24, choice) for choice in ("uniform", "block", "block, 2 %", "block, 1 %", "relative")),
    *((GRAM_24, choice) for choice in ("parameters", "absolute")),
    *((GRAM_24, choice) for choice in ("relative, 3 %", "relative, 3.6 %")),
]


def flags_of(setting: str) -> list[str]:
    """The flags that plan and compress share."""
    flags = SETTINGS[setting][0]
    text = ["--calibration", str(calibration_text()), "--windows", "leading"]
    if "gram" in flags:
        return [*flags, *text, "--n-sequences", "16", "--seqlen", "1024", "--propagate", "sequential"]
    if "joint-admm" in flags or "best" in flags:
        return [*flags, *text, "--n-sequences", "32", "--seqlen", "1024", "--calibration-dtype", "bfloat16"]
    return flags


def _slug(words: str) -> str:
    """Words as a part of a file's name."""
    return re.sub(r"\W+", "-", words).strip("-")


def measure(setting: str, choice: str) -> dict[str, Any]:
    """One cell."""
    row: dict[str, Any] = {"setting": setting, "choice": choice, "flags": shown([*flags_of(setting), *CHOICES[choice]])}
    if choice == "uniform":
        for name, cells in (("quality", quality.cells_done()), ("frontier", frontier.cells_done())):
            found = cells.done.get(SETTINGS[setting][1])
            if found is not None:
                return row | {"ppl": found["ppl"], "ratio": found["ratio"], "from": f"{name}-cpu.json"}
    # Folders of its own for every cell: two of these scripts may run at a time.
    cell = f"budgets-{_slug(f'{setting} {choice}')}"
    model, out, recipe = str(smollm2()), ROOT / "work" / cell, ROOT / "work" / f"{cell}.yaml"
    how = [*flags_of(setting), *CHOICES[choice]]
    if choice != "uniform":
        curves = ROOT / "work" / f"curves-{_slug(setting)}.json"
        files = ["--curves", str(curves), "--output", str(recipe), "--overwrite"]
        planned, seconds = run("plan", model, *how, *files)
        row |= {"plan_seconds": round(seconds, 1), "error": planned["error"], "uniform": planned["uniform"]}
        row["ranks"] = {tensor["name"]: tensor["rank"] for tensor in planned["tensors"]}
        if "--target-bytes" in how:
            row["sparsities"] = {tensor["name"]: tensor["sparsity"] for tensor in planned["tensors"]}
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
    lines = [["setting", "what is chosen by", "bytes", "perplexity"]]
    for row in sorted(rows, key=lambda row: (list(SETTINGS).index(row["setting"]), list(CHOICES).index(row["choice"]))):
        ranks = "rank 16 everywhere" if row["choice"] == "uniform" else f"`{row['choice']}`"
        lines.append([row["setting"], ranks, f"{100 * row['ratio']:.2f} %", f"{row['ppl']:.2f}"])
    publish("budgets", PAGE, (__doc__ or "").split("Protocol: ")[1], rows, table(lines))


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
