"""Perplexity of SmolLM2-135M by mask and by how it is mended; rank 16. Resumable: cells that are done are kept.

    python benchmarks/quality.py [--masks …] [--columns …] [--minutes 55] [--list]

Every cell is a point of a sweep, a process of its own that does what `mendlm compress` with the cell's flags and
`mendlm eval` do; its result goes to work/quality.jsonl at once; results/quality-cpu.json, which a fresh clone goes on
from, and docs/quality.md are written from it at the end. benchmarks/frontier.py measures the best settings against
bytes.

Protocol: float32; WikiText-2 raw test split joined with blank lines, its first 8 windows of 2048 tokens, no BOS.
Calibration: the first 16 windows of 1024 tokens of the tokenised WikiText-2 validation split, `<unk>` read as "the";
"self": 16 windows of 1024 tokens that the model wrote itself. All linear layers of the blocks, not the embedding.
Unless a column says "sequential", every block is calibrated on the activations of the dense model.
"""

from __future__ import annotations

from typing import Any

from _cells import Cells, Key, calibration_text, replace_block, table
from _common import ROOT

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
    "TLR, exact": ["--refiner", "tlr", "--solver", "exact", "--metric", "plain", *RANK],
    "accelerated": ["--refiner", "accelerated-tlr", "--metric", "plain", *RANK],
    "TLR, diagonal": ["--refiner", "tlr", "--metric", "diagonal", *RANK],
    "accelerated, diagonal": ["--refiner", "accelerated-tlr", "--metric", "diagonal", *RANK],
    "TLR, gram": ["--refiner", "tlr", "--metric", "gram", *RANK],
    "accelerated, gram": ["--refiner", "accelerated-tlr", "--metric", "gram", *RANK],
    "TLR, gram, sequential": ["--refiner", "tlr", "--metric", "gram", *RANK],
    "accelerated, gram, sequential": ["--refiner", "accelerated-tlr", "--metric", "gram", *RANK],
    "OATS": ["--refiner", "oats", "--metric", "diagonal", *RANK],
}
DATA_FREE = ("only pruned", "zero-shot SVD", "PCP", "TLR", "TLR, exact", "accelerated")

# Figures of a prototype with the same protocol, to be reproduced; Wanda and magnitude masks.
REFERENCE = {
    ("magnitude", "50 %"): (489.7, 220.9, 179.0, 186.2, 53.91),
    ("magnitude", "2:4"): (1328.9, 814.8, 644.2, 746.0, 123.6),
    ("Wanda", "50 %"): (40.55, 37.62, 35.11, 34.52, 34.66),
    ("Wanda", "2:4"): (152.4, 120.3, 93.59, 92.97, 91.00),
}
REFERENCE_COLUMNS = ("only pruned", "zero-shot SVD", "TLR", "accelerated", "accelerated, diagonal")


def flags_of(key: Key) -> list[str] | None:
    """The flags of a cell."""
    mask, sparsity, column = key
    if mask == "dense":
        return None
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


def cells() -> list[Key]:
    """(mask, sparsity, column) of every cell, the reference's first."""
    reference = [(m, s, c) for (m, s) in REFERENCE for c in REFERENCE_COLUMNS]
    best = "accelerated, gram, sequential"
    more = [
        *((m, s, best) for m, s in (("SparseGPT", "2:4"), ("Wanda", "2:4"), ("SparseGPT", "50 %"), ("Wanda", "50 %"))),
        *((m, s, "only pruned") for m in ("SparseGPT", "RIA", "Wanda, self") for s in SPARSITIES),
        *(("Wanda", s, "OATS") for s in SPARSITIES),
        *((m, s, "accelerated, gram") for m, s in REFERENCE),
        *((m, s, best) for m in ("SparseGPT, self", "magnitude") for s in SPARSITIES),
        *((m, s, "TLR") for m in ("RIA", "Wanda, self") for s in SPARSITIES),
        *(("SparseGPT", s, c) for c in ("zero-shot SVD", "TLR, gram") for s in SPARSITIES),
        *((m, s, "TLR, gram") for m, s in REFERENCE),
        *((m, s, "TLR, diagonal") for m, s in REFERENCE),
        *((m, s, best) for m in ("RIA", "Wanda, self") for s in SPARSITIES),
        *((m, s, "TLR, gram, sequential") for m, s in REFERENCE),
        *((m, s, "PCP") for m, s in REFERENCE),
        ("magnitude", "2:4", "TLR, exact"),
    ]
    return [("dense", "", ""), *reference, *more]


def markdown(results: dict[Key, dict[str, Any]]) -> str:
    """Masks down, columns across; the prototype's figure in parentheses."""
    columns = [c for c in COLUMNS if any(key[2] == c for key in results)]
    rows = [(m, s) for m in MASKS for s in SPARSITIES if any(key[:2] == (m, s) for key in results)]
    lines = [["mask", *columns]]
    for mask, sparsity in rows:
        line = [f"{mask} {sparsity}"]
        for column in columns:
            cell = results.get((mask, sparsity, column))
            text = "" if cell is None else f"{cell['ppl']:.2f}"
            if cell is not None and column in REFERENCE_COLUMNS and (mask, sparsity) in REFERENCE:
                text += f" ({REFERENCE[mask, sparsity][REFERENCE_COLUMNS.index(column)]:g})"
            line.append(text)
        lines.append(line)
    return table(lines)


def cells_done() -> Cells:
    """The cells measured so far."""
    return Cells("quality", ("mask", "sparsity", "column"), flags_of)


def main() -> None:
    store = cells_done()
    if not store.from_command_line(__doc__ or "", cells(), [list(MASKS), list(SPARSITIES), list(COLUMNS)], n_jobs=1):
        return
    rest = {key: row for key, row in store.done.items() if key[0] != "dense"}
    text = markdown(rest)
    if dense := store.done.get(("dense", "", "")):
        text = f"Dense: {dense['ppl']:.2f}.\n\n{text}"
        replace_block(PAGE, "quality", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
