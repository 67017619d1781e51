"""How the refinement behaves on real layers: the figures of docs/behaviour.md.

    python benchmarks/behaviour.py                     # measure (five minutes of one idle core), then draw
    python benchmarks/behaviour.py --sections theory   # some of it; sections that are done are kept in work/behaviour/
    python benchmarks/behaviour.py --draw              # draw from results/behaviour-cpu.json

Weights of SmolLM2-135M, float32, magnitude 50 % in the whole tensor. Every figure comes from `mendlm.refine` and its
trace, but for the paper's error ||L - L_k||, which needs the whole residual of every iteration: that is Algorithm 1
written out here with a full SVD per step in float64. Times are CPU seconds of one thread, so that other work on the
machine counts for little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import altair as alt
import torch
from torch import Tensor

import mendlm
from _cells import calibration_text
from _charts import BLUE, GREEN, GREY, ORANGE, lines, save, side_by_side
from _common import ROOT, environment, projections, smollm2
from mendlm import TLR, AcceleratedTLR, PruneOnly, Unstructured, ZeroShotSVD, refine, select_mask
from mendlm.plotting import rounded
from mendlm.refiners import AbstractRefiner

RESULT = ROOT / "benchmarks" / "results" / "behaviour-cpu.json"
KEPT = ROOT / "work" / "behaviour"
LAYER = "model.layers.15."
NAMES = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "up_proj": "mlp.up_proj"}
RANKS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
STEPS = (1, 2, 5, 10, 20, 50, 100)
EXACT_STEPS = (1, 2, 5, 10, 20, 50)
HELD = 50  # further steps of Algorithm 1 after its 50, at rank k
SEQLEN, N_SEQUENCES = 512, 4
# A rise below this share is rounding of float32.
ROUNDING = 1e-6


def weights() -> dict[str, Tensor]:
    found = projections(range(15, 16))
    return {short: found[f"{LAYER}{name}.weight"] for short, name in NAMES.items()}


def mask_of(W: Tensor) -> Tensor:
    return select_mask(W, "magnitude", Unstructured(0.5, "tensor"))


def algorithm_1(weight: Tensor, k: int, n_iter: int, held: int) -> dict[str, list[float]]:
    """Algorithm 1 with full SVDs in float64, then `held` steps more at rank k; relative to ||W||."""
    W, mask = weight.double(), mask_of(weight)
    norm = float(W.norm())
    S = W * mask
    trace: dict[str, list[float]] = {"rank": [], "objective": [], "paper": [], "change": [], "off_mask": []}
    for t in range(n_iter + held):
        U, sigma, Vh = torch.linalg.svd(W - S, full_matrices=False)
        r = min(k, 1 + (k - 1) * t // (n_iter - 1))
        step = mask * ((U[:, r:] * sigma[r:]) @ Vh[r:])
        S = S + step
        trace["rank"].append(r)
        trace["paper"].append(float(sigma[k:].norm()) / norm)
        trace["objective"].append(float(((W - (U[:, :r] * sigma[:r]) @ Vh[:r]) * ~mask).norm()) / norm)
        trace["change"].append(float(step.norm()) / norm)
        trace["off_mask"].append(float((S * ~mask).abs().max()))
    trace["spectrum"] = (torch.linalg.svdvals(W - S) / norm).tolist()
    return trace


def rises(values: list[float]) -> list[tuple[int, float]]:
    """Steps at which a series is above the step before, and by what share."""
    pairs = itertools.pairwise(values)
    return [(t, b / a - 1) for t, (a, b) in enumerate(pairs, start=1) if b > a * (1 + ROUNDING)]


def theory(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for short in ("v_proj", "q_proj"):
        W = found[short]
        for k in (16, 128):
            trace = algorithm_1(W, k, 50, HELD)
            api = refine(W, mask_of(W), TLR(k, solver="exact"))
            apart = max(
                abs(p.objective / float(W.norm()) / v - 1) for p, v in zip(api.trace, trace["objective"], strict=False)
            )
            row = {"weight": short, "k": k, "n_iter": 50, "held": HELD, "largest_off_mask": max(trace.pop("off_mask"))}
            row |= {"trace_of_refine_apart_by": apart, "objective_rises": rises(trace["objective"])}
            row |= {"paper_rises": rises(trace["paper"])} | {key: _short(value) for key, value in trace.items()}
            rows.append(row)
            print(
                short, k, "objective rises", len(row["objective_rises"]), "paper's", len(row["paper_rises"]), flush=True
            )
    return rows


def everywhere(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Pattern and monotone objective on every projection of every fifth block, subspace solver."""
    counts: dict[int, dict[str, Any]] = {}
    for name, W in projections(range(0, 30, 5)).items():
        mask = mask_of(W)
        for k in (16, 128):
            out = refine(W, mask, TLR(k, solver="subspace"))
            up = rises([p.objective for p in out.trace])
            row = counts.setdefault(k, {"k": k, "n_tensors": 0, "entries_off_mask": 0, "with_rises": 0, "worst": []})
            row["n_tensors"] += 1
            row["entries_off_mask"] += int(torch.count_nonzero(out.S[~mask]))
            row["with_rises"] += bool(up)
            row["worst"] += [{"name": name, "step": t, "rise": share} for t, share in up]
    for row in counts.values():
        worst = sorted(row.pop("worst"), key=lambda at: -at["rise"])
        row |= {"n_rises": len(worst), "last_step": max((at["step"] for at in worst), default=None), "worst": worst[:3]}
        print(row, flush=True)
    return list(counts.values())


REFINERS = {
    "zero-shot SVD": lambda k, n_iter: ZeroShotSVD(k),
    "TLR": lambda k, n_iter: TLR(k, n_iter, solver="subspace"),
    "accelerated TLR": lambda k, n_iter: AcceleratedTLR(k, n_iter, rtol=0),
    "TLR, exact": lambda k, n_iter: TLR(k, n_iter, solver="exact"),
}


def measured(W: Tensor, refiner: AbstractRefiner) -> tuple[float, float]:
    """Error off the mask relative to ||W||, CPU seconds."""
    mask = mask_of(W)
    start = time.process_time()
    out = refine(W, mask, refiner)
    return out.objective / float(W.norm()), time.process_time() - start


def ranks(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for short, W in found.items():
        pruned = refine(W, mask_of(W), PruneOnly()).objective / float(W.norm())
        rows.append({"weight": short, "refiner": "only pruned", "k": 0, "error": pruned})
        for name in ("zero-shot SVD", "TLR", "accelerated TLR"):
            for k in (k for k in RANKS if k <= min(W.shape)):
                rows.append({"weight": short, "refiner": name, "k": k, "error": measured(W, REFINERS[name](k, 50))[0]})
    return rows


def iterations(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for short, sizes in {"q_proj": (16, 128), "up_proj": (128,)}.items():
        for k in sizes:
            for name in ("TLR", "accelerated TLR", "TLR, exact"):
                for n_iter in EXACT_STEPS if name.endswith("exact") else STEPS:
                    refiner = REFINERS[name](k, n_iter)
                    error, seconds = measured(found[short], refiner)
                    row = {"weight": short, "refiner": name, "k": k, "n_iter": n_iter}
                    rows.append(row | {"error": error, "cpu_seconds": seconds})
            print("iterations", short, k, flush=True)
    return rows


def metrics(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Errors of weights and of outputs, on the calibrated text and on text held out, by metric."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2())(calibration_text().read_text(), add_special_tokens=False)[
        "input_ids"
    ]
    windows = torch.tensor(ids[: 2 * N_SEQUENCES * SEQLEN]).view(2, N_SEQUENCES, SEQLEN)
    model = mendlm.load(smollm2()).model
    model.layers = model.layers[:16]  # what comes after the layer is not needed
    seen: dict[str, list[Tensor]] = {short: [] for short in ("q_proj", "up_proj")}
    for short, inputs_of in seen.items():
        layer = model.get_submodule(f"{LAYER}{NAMES[short]}".removeprefix("model."))
        layer.register_forward_pre_hook(lambda module, given, kept=inputs_of: kept.append(given[0][0].double()))
    with torch.no_grad():
        for window in windows.flatten(0, 1):
            model(window[None], use_cache=False)
    rows = []
    for short, inputs_of in seen.items():
        W = found[short]
        X, other = torch.cat(inputs_of[:N_SEQUENCES]), torch.cat(inputs_of[N_SEQUENCES:])
        inputs = mendlm.InputStats(len(X), X.square().mean(dim=0), X.T @ X / len(X))
        mask = mask_of(W)
        choices = {"plain": {}, "diagonal": {"input_scale": inputs.scale}, "gram": {"gram": inputs.gram}}
        for refiner in (PruneOnly(), TLR(16), AcceleratedTLR(16), TLR(128), AcceleratedTLR(128)):
            for metric, chosen in choices.items():
                if isinstance(refiner, PruneOnly) and metric == "diagonal":
                    continue  # the same as plain
                out = refine(W, mask, refiner, **chosen)  # type: ignore[arg-type]
                E = (W - out.S - out.B @ out.A).double()
                shares = [float((Y @ E.T).norm() / (Y @ W.double().T).norm()) for Y in (X, other)]
                row = {"weight": short, "refiner": refiner.name, "k": refiner.rank, "metric": metric}
                row |= {"weights": float(E.norm() / W.norm()), "outputs": shares[0], "outputs_held_out": shares[1]}
                rows.append(row)
                print(row, flush=True)
    return rows


def spectrum(found: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for short, W in found.items():
        mask = mask_of(W)
        before = torch.linalg.svdvals(W * ~mask) / W.norm()
        rows.append({"weight": short, "what": "only pruned", "k": 0, "sigma": _short(before.tolist())})
        for k in (16, 128):
            for refiner in (TLR(k), AcceleratedTLR(k)):
                out = refine(W, mask, refiner)
                sigma = torch.linalg.svdvals(W - out.S) / W.norm()
                shares = [float(s[:k].square().sum() / s.square().sum()) for s in (before, sigma)]
                row = {
                    "weight": short,
                    "what": refiner.name,
                    "k": k,
                    "energy_before": shares[0],
                    "energy_after": shares[1],
                }
                rows.append(row | {"sigma": _short(sigma.tolist())})
    return rows


def _short(values: list[float]) -> list[float]:
    return [rounded(value) for value in values]


SECTIONS = {
    "ranks": ranks,
    "iterations": iterations,
    "metrics": metrics,
    "spectrum": spectrum,
    "theory": theory,
    "everywhere": everywhere,
}


def measure(names: list[str]) -> None:
    """Measure the sections that are not kept yet; once all are there, write the result."""
    torch.set_num_threads(1)
    found = weights()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in names:
        kept = KEPT / f"{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(SECTIONS[name](found)))
            print(name, "done", flush=True)
    if all((KEPT / f"{name}.json").exists() for name in SECTIONS):
        shapes = {short: list(W.shape) for short, W in found.items()}
        document: dict[str, Any] = {"benchmark": "behaviour", "environment": environment("cpu"), "shapes": shapes}
        document |= {name: json.loads((KEPT / f"{name}.json").read_text()) for name in SECTIONS}
        RESULT.write_text(json.dumps(document, ensure_ascii=False) + "\n")


def draw(document: dict[str, Any]) -> None:
    """The five pictures of the page."""
    rows = {"TLR": BLUE, "accelerated TLR": GREEN, "zero-shot SVD": ORANGE}
    save(
        side_by_side(
            *(
                lines(
                    [{"x": t, "y": v, "what": what} for what, v, t in _monotone(document["theory"], k)],
                    "iteration",
                    "relative to ‖W‖",
                    title=f"q_proj, k = {k}: Algorithm 1, then rank k held",
                    colours={"objective": BLUE, "‖L − L_k‖": ORANGE, "change of S": GREY},
                    logs="y",
                )
                for k in (16, 128)
            )
        ),
        "behaviour-convergence",
    )
    save(
        side_by_side(
            *(
                lines(
                    [{"x": r["k"], "y": r["error"], "what": r["refiner"]} for r in _of(document["ranks"], weight)],
                    "rank k",
                    "error / ‖W‖",
                    title=f"{weight}, {' × '.join(map(str, document['shapes'][weight]))}, T = 50",
                    colours=rows,
                    points=True,
                )
                for weight in ("q_proj", "up_proj")
            )
        ),
        "behaviour-rank",
    )
    speed = {"TLR, exact": ORANGE, "TLR": BLUE, "accelerated TLR": GREEN}
    up = [r for r in _of(document["iterations"], "up_proj") if r["k"] == 128]
    axes = {"n_iter": "iterations T", "cpu_seconds": "CPU seconds of one thread"}
    save(
        side_by_side(
            *(
                lines(
                    [{"x": r[field], "y": r["error"], "what": r["refiner"]} for r in up],
                    title,
                    "error / ‖W‖",
                    title="up_proj, k = 128",
                    colours=speed,
                    logs="x",
                    points=True,
                )
                for field, title in axes.items()
            )
        ),
        "behaviour-iterations",
    )
    spectra = {"only pruned": GREY, "TLR": BLUE, "accelerated TLR": GREEN}
    shown = {"tlr": "TLR", "accelerated-tlr": "accelerated TLR", "only pruned": "only pruned"}
    save(
        side_by_side(
            *(
                lines(
                    [
                        {"x": i, "y": sigma, "what": shown[r["what"]]}
                        for r in _of(document["spectrum"], "q_proj")
                        if r["k"] in (0, k)
                        for i, sigma in enumerate(r["sigma"], start=1)
                        if i <= 300
                    ],
                    "i",
                    "σᵢ of W − S, relative to ‖W‖",
                    title=f"q_proj, k = {k}",
                    colours=spectra,
                )
                for k in (16, 128)
            )
        ),
        "behaviour-spectrum",
    )
    save(_metric_bars(document["metrics"]), "behaviour-metric")


def _of(rows: list[dict[str, Any]], weight: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["weight"] == weight]


def _monotone(rows: list[dict[str, Any]], k: int) -> list[tuple[str, float, int]]:
    row = next(row for row in _of(rows, "q_proj") if row["k"] == k)
    names = {"objective": "objective", "paper": "‖L − L_k‖", "change": "change of S"}
    return [(what, value, t) for field, what in names.items() for t, value in enumerate(row[field], start=1)]


def _metric_bars(rows: list[dict[str, Any]]) -> alt.HConcatChart:
    """Output error by metric, on the text of calibration and on other text; accelerated TLR."""
    charts = []
    for weight in ("q_proj", "up_proj"):
        values = [
            {"metric": row["metric"], "text": text, "k": f"k = {row['k']}", "error": row[field]}
            for row in _of(rows, weight)
            if row["refiner"] == "accelerated-tlr"
            for text, field in (("calibrated on", "outputs"), ("held out", "outputs_held_out"))
        ]
        order = ["plain", "diagonal", "gram"]
        text = alt.Color("text:N", scale=alt.Scale(range=[BLUE, ORANGE]), legend=alt.Legend(title=None, orient="top"))
        charts.append(
            alt.Chart(alt.Data(values=values), title=weight, width=150, height=200)
            .mark_bar()
            .encode(
                x=alt.X("metric:N", sort=order, title=None, axis=alt.Axis(labelAngle=0)),
                xOffset="text:N",
                y=alt.Y("error:Q", title="error of the outputs"),
                color=text,
                column=alt.Column("k:N", sort=["k = 16", "k = 128"], title=None),
            )
        )
    return side_by_side(*charts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw, from the committed results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    if not options.draw:
        measure(options.sections)
    if RESULT.exists():
        draw(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
