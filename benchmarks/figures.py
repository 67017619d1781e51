"""The pictures of README and docs, from a real layer and from the committed results.

python benchmarks/figures.py            # needs mendlm[plot]; writes docs/images/*.svg
"""

from __future__ import annotations

import json

import matplotlib as mpl
import matplotlib.pyplot as plt

from _common import ROOT, projections
from mendlm import TLR, AcceleratedTLR, Unstructured, refine, select_mask

IMAGES = ROOT / "docs" / "images"
LAYER = "model.layers.15.mlp.up_proj.weight"
# Okabe-Ito colours: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6f6f6f"


def main() -> None:
    mpl.rcParams.update(
        {"font.size": 10, "svg.hashsalt": "mendlm", "axes.spines.top": False, "axes.spines.right": False}
    )
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    perplexities(left)
    speed(right)
    figure.tight_layout()
    figure.savefig(IMAGES / "headline.svg", metadata={"Date": None})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, k in zip(axes, (16, 128), strict=True):
        convergence(axis, k)
    figure.tight_layout()
    figure.savefig(IMAGES / "convergence.svg", metadata={"Date": None})


def rows(name: str) -> list[dict[str, object]]:
    parsed: list[dict[str, object]] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    return parsed


def perplexities(axis: plt.Axes) -> None:
    wanted = {
        "dense": "dense",
        "only pruned": "pruned",
        "zero-shot SVD, as published": "+ zero-shot\nSVD",
        "TLR": "+ TLR",
    }
    found = {r["recipe"]: r for r in rows("model-cpu") if r["mask"] in ("none", "magnitude 50 %")}
    values = [float(found[recipe]["ppl"]) for recipe in wanted]  # type: ignore[arg-type]
    bars = axis.bar(list(wanted.values()), values, color=[GREY, ORANGE, GREEN, BLUE])
    axis.bar_label(bars, [f"{v:.1f}" if v < 100 else f"{v:.0f}" for v in values])
    axis.set_ylabel("perplexity (lower is better)")
    axis.set_title("SmolLM2-135M, magnitude 50 %, rank 16, no data")


def speed(axis: plt.Axes) -> None:
    labels, exact, fast = [], [], []
    for row in rows("solvers-cpu"):
        if str(row["refiner"]).startswith("tlr"):
            labels.append(f"{str(row['layer']).replace(' ', '')}\nk = {row['k']}")
            exact.append(float(row["exact_seconds"]))  # type: ignore[arg-type]
            fast.append(float(row["seconds"]))  # type: ignore[arg-type]
    large = rows("large-matrix-cpu")[0]
    labels.append("4096×4096\nk = 128")
    exact.append(float(large["exact_seconds_scaled"]))  # type: ignore[arg-type]
    fast.append(float(large["tlr_seconds"]))  # type: ignore[arg-type]
    places = range(len(labels))
    axis.bar([p - 0.2 for p in places], exact, 0.4, color=ORANGE, label="full SVD per step")
    bars = axis.bar([p + 0.2 for p in places], fast, 0.4, color=BLUE, label="subspace (default)")
    axis.bar_label(bars, [f"{e / f:.0f}×" for e, f in zip(exact, fast, strict=True)])
    axis.set_yscale("log")
    axis.set_ylim(top=max(exact) * 6)
    axis.set_xticks(list(places), labels, fontsize=8)
    axis.set_ylabel("seconds, 2 CPU cores")
    axis.legend(frameon=False, loc="upper left", fontsize=8)
    axis.set_title("TLR, 50 iterations")


def convergence(axis: plt.Axes, k: int) -> None:
    W = projections(range(15, 16))[LAYER]
    mask = select_mask(W, "magnitude", Unstructured(0.5))
    norm = float(W.norm())
    styles = {
        "TLR, exact": (TLR(k, solver="exact"), ORANGE, "-"),
        "TLR, subspace": (TLR(k, solver="subspace"), BLUE, "--"),
        "accelerated TLR": (AcceleratedTLR(k, rtol=0), GREEN, "-"),
    }
    for label, (refiner, colour, style) in styles.items():
        trace = refine(W, mask, refiner).trace
        steps = range(1, len(trace) + 1)
        axis.plot(steps, [p.objective / norm for p in trace], style, color=colour, label=label)
    axis.set_xlabel("iteration")
    axis.set_ylabel("objective / ‖W‖")
    axis.set_title(f"{LAYER.removesuffix('.weight')}, k = {k}", fontsize=9)
    axis.legend(frameon=False)


if __name__ == "__main__":
    main()
