"""Perplexity of SmolLM2-135M against stored bytes, by method; the published one-shot methods and ours, in one protocol.

    python benchmarks/frontier.py [--methods …] [--patterns …] [--ranks …] [--minutes M] [--jobs N] [--device …]

Resumable: a cell is a point of a sweep; one that is done is kept in work/frontier.jsonl and results/frontier-cpu.json
or frontier-cuda.json; docs/quality.md and docs/images/frontier.svg are drawn from what there is. The most telling cells
come first: rank 16 at 2:4 and 50 %.

Protocol: perplexity in float32 on the WikiText-2 raw test split joined with blank lines, its first 8 windows of 2048
tokens, no BOS. Calibration of every method, ours too: the first 32 windows of 1024 tokens of the tokenised WikiText-2
validation split, `<unk>` read as "the", run in bfloat16; "self": as many tokens that the model wrote itself, or 64
windows of them where it says so; block by block on what the compressed blocks before give. All linear layers of the
blocks, not the embedding. Storage float32. Under a sparsity weights compete as in the criterion's paper (Wanda and
DSnoT by row, others in the tensor; OATS by row). Seconds are of the compression on one thread of a busy machine (null
where the run was paused); on a GPU, of one of `--jobs` that shared it.
"""

from __future__ import annotations

import math
from itertools import cycle, product
from typing import Any

from _cells import Cells, Key, calibration_text, replace_block, table
from _common import ROOT

PAGE = ROOT / "docs" / "quality.md"
PICTURE = ROOT / "docs" / "images" / "frontier.svg"
PATTERNS = {
    "2:4": ["--pattern", "2:4"],
    "4:8": ["--pattern", "4:8"],
    "50 %": ["--sparsity", "0.5"],
    "60 %": ["--sparsity", "0.6"],
    "70 %": ["--sparsity", "0.7"],
}
RANKS = ("0", "8", "16", "32")
DRAWN_PPL = 300.0  # what is worse than that would press the rest of the picture together
STRONGEST = {"HASSLE-free", "JointADMM"}  # without which the lowest of a column says nothing
PRUNED = ["--refiner", "none"]
DSNOT = ["--recipe", "dsnot-50"]  # with Wanda's mask in the MLP, as its code
ZERO_SHOT = ["--recipe", str(ROOT / "benchmarks" / "recipes" / "zero-shot-published.yaml")]

# method -> flags; with a rank they are given --rank too, unless the method has none
PUBLISHED: dict[str, list[str]] = {
    "magnitude": ["--criterion", "magnitude", *PRUNED],
    "Wanda": ["--criterion", "wanda", *PRUNED],
    "DSnoT": DSNOT,
    "SparseGPT": ["--criterion", "sparsegpt", *PRUNED],
    "Wanda + zero-shot SVD": ["--criterion", "wanda", *ZERO_SHOT],
    "Wanda + TLR": ["--criterion", "wanda", "--refiner", "tlr", "--metric", "plain"],
    "DSnoT + TLR": [*DSNOT, "--refiner", "tlr", "--metric", "plain"],
    "Wanda + SLiM-LoRA": ["--criterion", "wanda", "--refiner", "slim-lora"],
    "SparseGPT + zero-shot SVD": ["--criterion", "sparsegpt", *ZERO_SHOT],
    "SparseGPT + EoRA": ["--criterion", "sparsegpt", "--refiner", "eora"],
    "OATS": ["--criterion", "wanda", "--refiner", "oats"],
    "HASSLE-free": ["--criterion", "magnitude", "--refiner", "hassle-free"],
}
OURS: dict[str, list[str]] = {
    "fast": ["--preset", "fast"],  # the paper's own: TLR on a magnitude mask
    "balanced": ["--preset", "balanced"],
    "JointADMM": ["--criterion", "magnitude", "--refiner", "joint-admm"],
    "best": ["--preset", "best"],
}
# What each step towards the best adds where there is no data.
SELF = ["--calibration", "self"]
NO_DATA: dict[str, list[str]] = {
    "no data: magnitude + TLR, mask moves": ["--criterion", "magnitude", "--refiner", "oats", "--metric", "plain"],
    "self: Wanda + TLR": [*SELF, "--criterion", "wanda", "--refiner", "tlr", "--metric", "plain"],
    "self: Wanda + accelerated, gram": [*SELF, "--criterion", "wanda", "--refiner", "accelerated-tlr"],
    "self: JointADMM": [*SELF, "--criterion", "magnitude", "--refiner", "joint-admm"],
    "self: best": [*SELF, "--preset", "best"],
    # Text of its own costs time, and nothing else.
    "self, 64 windows: best": [*SELF, "--n-sequences", "64", "--preset", "best"],
}
METHODS = PUBLISHED | OURS | NO_DATA
WITHOUT_RANK = ("magnitude", "Wanda", "DSnoT", "SparseGPT")
ALSO_RANK_0 = ("HASSLE-free", "JointADMM")
ONLY_2_4 = ("self, 64 windows: best",)  # at 50 % 32 windows come within 3 % of real text
WITHOUT_DATA = ("magnitude", "fast", "no data: magnitude + TLR, mask moves")


def flags_of(key: Key) -> list[str] | None:
    """The flags of a cell."""
    method, pattern, rank = key
    if method == "dense":
        return None
    flags = [*METHODS[method], *PATTERNS[pattern]]
    if method not in WITHOUT_DATA:
        if "--calibration" not in flags:
            flags += ["--calibration", str(calibration_text()), "--windows", "leading"]
        if "--n-sequences" not in flags:
            flags += ["--n-sequences", "32"]
        flags += ["--seqlen", "1024", "--calibration-dtype", "bfloat16"]
    if method == "OATS" and pattern.endswith("%"):
        flags += ["--scope", "row"]
    return flags if method in WITHOUT_RANK else [*flags, "--rank", rank]


def cells() -> list[Key]:
    """(method, pattern, rank) of every cell, the most telling first."""

    def fits(method: str, rank: str) -> bool:
        return (rank == "0") == (method in WITHOUT_RANK) or (rank == "0" and method in ALSO_RANK_0)

    order = [("2:4", "16"), ("50 %", "16"), ("2:4", "0"), ("50 %", "0"), ("60 %", "16"), ("2:4", "32"), ("2:4", "8")]
    order += [(p, r) for p in PATTERNS for r in RANKS if (p, r) not in order]
    first = ["HASSLE-free", "JointADMM", "SparseGPT + EoRA", "best", "balanced", "OATS", "fast"]
    methods = [*first, *(m for m in METHODS if m not in first)]
    places = dict.fromkeys(NO_DATA, order[:2]) | dict.fromkeys(ONLY_2_4, order[:1])
    keys = [(m, p, r) for p, r in order for m in methods if fits(m, r) and (p, r) in places.get(m, order)]
    return [("dense", "", ""), *keys]


def markdown(store: Cells) -> str:
    """A section per pattern: methods down, ranks across, the lowest perplexity of a column in bold."""
    dense = store.done[("dense", "", "")]["ppl"]
    parts = [f"Dense: {dense:.2f}."]
    for pattern in PATTERNS:
        found = {(m, r): row for (m, p, r), row in store.done.items() if p == pattern}
        ranks = [r for r in RANKS if any(key[1] == r for key in found)]
        if not ranks:
            continue
        ratios = {r: next(row["ratio"] for key, row in found.items() if key[1] == r) for r in ranks}
        columns = {r: {key[0]: row["ppl"] for key, row in found.items() if key[1] == r} for r in ranks}
        least = {r: min(ppls.values()) if ppls.keys() >= STRONGEST else math.nan for r, ppls in columns.items()}
        lines = [[pattern, *(f"rank {r} ({ratios[r]:.3f})" for r in ranks), "× dense", "seconds", "peak MB"]]
        for method in [m for m in METHODS if any(key[0] == m for key in found)]:
            rows = {r: found[method, r] for r in ranks if (method, r) in found}
            last = rows.get("16") or next(iter(rows.values()))
            shown = [_cell(rows[r]["ppl"], least[r]) if r in rows else "" for r in ranks]
            lines.append([method, *shown, f"{last['ppl'] / dense:.2f}", *_costs(last)])
        parts.append(table(lines))
    return "\n\n".join(parts)


def _cell(ppl: float, least: float) -> str:
    return f"**{ppl:.2f}**" if ppl == least else f"{ppl:.2f}"


def _costs(row: dict[str, Any]) -> list[str]:
    """Seconds and the peak of memory, which is the device's where that is a GPU."""
    on_gpu = "device" in row
    costs = f"{row['seconds']:.0f}", str(row["peak_device_mb" if on_gpu else "peak_mb"])
    return [f"{cost} (GPU)" if on_gpu else cost for cost in costs]


def excess(store: Cells) -> str:
    """Our log-perplexity above dense against that of the best published method: a row per pattern and rank."""
    dense = store.done[("dense", "", "")]["ppl"]
    lines = [["pattern", "rank", "lowest published", *OURS]]
    for pattern, rank in product(PATTERNS, RANKS):
        found = {m: row["ppl"] for (m, p, r), row in store.done.items() if (p, r) == (pattern, rank)}
        rivals = {m: ppl for m, ppl in found.items() if m in PUBLISHED}
        if not rivals:
            continue
        rival = min(rivals, key=lambda m: rivals[m])
        base = math.log(rivals[rival] / dense)
        shares = {m: 100 * math.log(found[m] / dense) / base - 100 for m in OURS if m in found}
        ours = (f"{shares[m]:+.0f} %" if m in shares else "" for m in OURS)
        lines.append([pattern, rank, f"{rival} {rivals[rival]:.2f}", *ours])
    return f"Log-perplexity above dense, against that of the lowest published method:\n\n{table(lines)}"


def draw(store: Cells) -> None:
    """Perplexity against bytes, a line for each method."""
    import altair as alt

    from mendlm.plotting import save

    points = [
        {
            "method": method,
            "kind": "ours" if method in OURS else "published",
            "panel": "unstructured" if pattern.endswith("%") else pattern,
            "ratio": round(row["ratio"], 5),
            "ppl": round(row["ppl"], 4),
        }
        for (method, pattern, _), row in store.done.items()
        if method in PUBLISHED | OURS and row["ppl"] <= DRAWN_PPL
    ]
    methods = [m for m in METHODS if any(point["method"] == m for point in points)]
    # Published methods in pale colours, ours in strong ones.
    colours = "9aa5b1 d6c08a a3c1ad d9a3c4 8fb3d1 d99f7d bcbcbc a9c46c b59ad1 6f8f8f c7786c 8d8a5a".split()
    pale = cycle(f"#{colour}" for colour in colours)
    strong = {"fast": "#56B4E9", "balanced": "#009E73", "JointADMM": "#0072B2", "best": "#D55E00"}
    strong["HASSLE-free"] = "#1b1f24"  # the best of the published ones
    scale = alt.Scale(domain=methods, range=[strong.get(method) or next(pale) for method in methods])
    dense = alt.Chart().transform_calculate(dense=str(store.done[("dense", "", "")]["ppl"]))
    lines = alt.Chart().encode(
        x=alt.X(
            "ratio:Q", title="stored bytes / dense bytes", scale=alt.Scale(zero=False), axis=alt.Axis(format=".3f")
        ),
        y=alt.Y("ppl:Q", title=f"perplexity, up to {DRAWN_PPL:.0f}", scale=alt.Scale(type="log", nice=False)),
        color=alt.Color("method:N", sort=methods, scale=scale, title=None),
    )
    dashes = alt.Scale(domain=["ours", "published"], range=[[1, 0], [4, 3]])
    shapes = alt.Scale(domain=["ours", "published"], range=["circle", "cross"])
    layers = alt.layer(
        dense.mark_rule(color="#57606a").encode(y="dense:Q"),
        lines.mark_line(strokeWidth=1.8).encode(strokeDash=alt.StrokeDash("kind:N", scale=dashes, title=None)),
        lines.mark_point(filled=True, size=36).encode(shape=alt.Shape("kind:N", scale=shapes, title=None)),
        data=alt.Data(values=points),
    ).properties(width=260, height=320)
    save(layers.facet(column=alt.Column("panel:N", title=None)).to_dict(), PICTURE)


def cells_done() -> Cells:
    """The cells measured so far."""
    return Cells("frontier", ("method", "pattern", "rank"), flags_of)


def main() -> None:
    store = cells_done()
    if not store.from_command_line(__doc__ or "", cells(), [list(METHODS), list(PATTERNS), list(RANKS)], n_jobs=2):
        return
    text = "\n\n".join(part for part in (markdown(store), excess(store)) if part)
    replace_block(PAGE, "frontier", text)
    print(f"\n{text}")
    draw(store)


if __name__ == "__main__":
    main()
