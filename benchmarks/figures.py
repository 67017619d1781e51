"""The pictures of README and docs, from a real layer and from the committed results.

python benchmarks/figures.py            # needs mendlm[plot]; writes docs/images/headline.svg and convergence.svg
"""

from __future__ import annotations

import json
from typing import Any

import altair as alt

from _charts import BLUE, GREEN, GREY, ORANGE, lines, save, side_by_side
from _common import ROOT, projections
from mendlm import TLR, AcceleratedTLR, Unstructured, refine, select_mask

LAYER = "model.layers.15.mlp.up_proj.weight"


def main() -> None:
    save(side_by_side(perplexities(), speed()), "headline")
    save(side_by_side(convergence(16), convergence(128)), "convergence")


def rows(name: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    return parsed


def perplexities() -> alt.LayerChart:
    wanted = {
        "dense": "dense",
        "only pruned": "pruned",
        "zero-shot SVD, as published": "+ zero-shot SVD",
        "TLR": "+ TLR",
    }
    found = {r["recipe"]: float(r["ppl"]) for r in rows("model-cpu") if r["mask"] in ("none", "magnitude 50 %")}
    values = [
        {"what": shown, "ppl": found[recipe], "text": f"{found[recipe]:.{1 if found[recipe] < 100 else 0}f}"}
        for recipe, shown in wanted.items()
    ]
    names = list(wanted.values())
    colour = alt.Color("what:N", scale=alt.Scale(domain=names, range=[GREY, ORANGE, GREEN, BLUE]), legend=None)
    title = "SmolLM2-135M, magnitude 50 %, rank 16, no data"
    base = alt.Chart(alt.Data(values=values), title=title, width=340, height=220).encode(
        x=alt.X("what:N", sort=names, title=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("ppl:Q", title="perplexity (lower is better)"),
    )
    return base.mark_bar().encode(color=colour) + base.mark_text(dy=-7).encode(text="text:N")


def speed() -> alt.LayerChart:
    measured = [
        (f"{str(row['layer']).replace(' ', '')}, k = {row['k']}", row["exact_seconds"], row["seconds"])
        for row in rows("solvers-cpu")
        if str(row["refiner"]).startswith("tlr")
    ]
    large = rows("large-matrix-cpu")[0]
    measured.append(("4096x4096, k = 128", large["exact_seconds_scaled"], large["tlr_seconds"]))
    solvers = ["full SVD per step", "subspace (default)"]
    values = [
        {"layer": layer.replace("x", "×"), "solver": solver, "seconds": seconds, "text": text}
        for layer, exact, fast in measured
        for solver, seconds, text in zip(solvers, (exact, fast), ("", f"{exact / fast:.0f}×"), strict=True)
    ]
    base = alt.Chart(alt.Data(values=values), title="TLR, 50 iterations", width=380, height=220).encode(
        x=alt.X("layer:N", sort=None, title=None, axis=alt.Axis(labelAngle=0, labelExpr="split(datum.label, ', ')")),
        xOffset=alt.XOffset("solver:N", sort=solvers),
        y=alt.Y("seconds:Q", title="seconds, 2 CPU cores", scale=alt.Scale(type="log", domainMin=0.02)),
    )
    colour = alt.Color(
        "solver:N",
        scale=alt.Scale(domain=solvers, range=[ORANGE, BLUE]),
        legend=alt.Legend(title=None, orient="top-left", fillColor="white"),
    )
    # Bars of a logarithmic axis begin at its lower end, not at 0.
    bars = base.mark_bar().encode(color=colour, y2=alt.Y2Datum(0.02))
    return bars + base.mark_text(dy=-7).encode(text="text:N")


def convergence(k: int) -> alt.Chart:
    W = projections(range(15, 16))[LAYER]
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    norm = float(W.norm())
    refiners = {
        "TLR, exact": TLR(k, solver="exact"),
        "TLR, subspace": TLR(k, solver="subspace"),
        "accelerated TLR": AcceleratedTLR(k, rtol=0),
    }
    points = [
        {"x": step, "y": progress.objective / norm, "what": name}
        for name, refiner in refiners.items()
        for step, progress in enumerate(refine(W, mask, refiner).trace, start=1)
    ]
    colours = dict(zip(refiners, (ORANGE, BLUE, GREEN), strict=True))
    title = f"{LAYER.removesuffix('.weight')}, k = {k}"
    return lines(points, "iteration", "objective / ‖W‖", title=title, colours=colours, dashed=("TLR, subspace",))


if __name__ == "__main__":
    main()
