"""The figures of a report: a chart, its title, and the same in words for those who do not see it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mendlm import plotting
from mendlm.evaluation.printed import Protocol
from mendlm.families import place_of, short_names
from mendlm.plotting import mean_cells, rounded
from mendlm.report._runs import Run
from mendlm.report._tensors import TensorDetail
from mendlm.report.records import TensorRecord
from mendlm.sweeping import SweepRecord
from mendlm.sweeping.records import DENSE, unbeaten

MAX_ITERATIONS = 200  # of a trace that are drawn


@dataclass(frozen=True)
class Figure:
    """One chart.

    Attributes
    ----------
    name : for files and for the page; letters, digits and "-".
    title : what it shows.
    words : the same as text.
    spec : Vega-Lite, data inside.
    """

    name: str
    title: str
    words: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A model in the plot of quality against bytes; `protocol` says which perplexity it has."""

    label: str
    group: str
    stored_bytes: int
    ppl: float | None
    rel_error: float | None
    protocol: Protocol | None = None


def heat_maps(run: Run) -> list[Figure]:
    """Relative error, rank, sparsity and, where there is one, output error by layer and projection."""
    quantities = [
        ("rel-error", "relative error", ".3~g", lambda r: r.rel_error),
        ("output-error", "relative error of the outputs", ".3~g", lambda r: r.rel_output_error),
        ("rank", "rank", "~g", lambda r: float(r.rank)),
        ("sparsity", "sparsity", ".3~g", lambda r: r.sparsity),
    ]
    figures = []
    for name, title, number, value_of in quantities:
        cells = _cells(run.manifest.records, value_of)
        if cells:
            chart = plotting.heat_map(cells, title, number=number)
            words = f"{title.capitalize()} by layer and projection: {_extremes(cells)}."
            figures.append(Figure(f"heat-{name}", title, words, chart))
    return figures


def error_by_layer(run: Run) -> Figure | None:
    """Relative error against the layer; None where no tensor is in a layer."""
    cells = _cells(run.manifest.records, lambda r: r.rel_error)
    if not cells:
        return None
    means = {
        layer: math.fsum(c["value"] for c in row) / len(row)
        for layer, row in ((k, list(g)) for k, g in groupby(sorted(cells, key=_layer), key=_layer))
    }
    worst = max(means, key=lambda layer: means[layer])
    words = (
        f"Relative error of every projection against the layer. The mean of a layer is largest in layer {worst} "
        f"({means[worst]:.3g}) and {means[min(means)]:.3g} in the first, {means[max(means)]:.3g} in the last."
    )
    spec = plotting.lines_by(cells, "layer", "projection", "relative error", legend="bottom")
    return Figure("error-by-layer", "relative error by layer", words, spec)


def tensor_figures(detail: TensorDetail) -> list[Figure]:
    """Spectrum, convergence where it is known, and mask of one weight."""
    figures = [_spectrum(detail)]
    if detail.trace:
        figures.append(_convergence(detail))
    if detail.tile and detail.tile[0]:
        figures.append(_mask(detail))
    return figures


def matching(run: Run) -> Figure | None:
    """Loss of every matched block before and after; None without matching."""
    blocks = run.manifest.matching
    if not blocks:
        return None
    rows = [
        {"block": block.block, "when": when, "value": rounded(value)}
        for block in blocks
        for when, value in (("before", block.loss_before), ("after", block.loss_after))
    ]
    improved = sum(block.status == "improved" for block in blocks)
    words = (
        f"Loss of each block on the windows held out, before and after matching: {improved} of {len(blocks)} blocks "
        f"improved; the last went from {blocks[-1].loss_before:.3g} to {blocks[-1].loss_after:.3g}."
    )
    spec = plotting.lines_by(rows, "block", "when", "relative squared error")
    return Figure("matching", "matching of the blocks", words, spec)


def points_of(runs: Sequence[Run], sweeps: Iterable[SweepRecord], dense: Sequence[Point]) -> list[Point]:
    """Points of runs, of the done records of sweeps, and dense models, with perplexities that compare.

    These are of the text, the windows and the dtype that most compressed models have in common, of several the first;
    a model that was measured otherwise has none.
    """
    done = [record for record in sweeps if record.status == "done" and record.stored_bytes is not None]
    measured = [run.evaluations for run in runs]
    common = Counter(protocol for found in measured for protocol in dict.fromkeys(e.protocol for e in found))
    common.update(_protocol(record) for record in done if record.recipe is not None)
    protocol = common.most_common(1)[0][0] if common else None
    points = [
        Point(
            run.label,
            str(run.manifest.recipe["refiner"]),
            run.manifest.totals.stored_bytes,
            next((e.ppl for e in run.evaluations if e.protocol == protocol), None),
            run.rel_error,
            protocol,
        )
        for run in runs
    ]
    for record in done:
        group = DENSE if record.recipe is None else str(record.recipe["refiner"])
        finite = record.ppl is not None and math.isfinite(record.ppl)
        ppl = record.ppl if finite and _protocol(record) == protocol else None
        points.append(Point(record.name, group, record.stored_bytes or 0, ppl, record.mean_rel_error, protocol))
    return [*points, *(point for point in dense if point.protocol == protocol)]


def _protocol(record: SweepRecord) -> Protocol:
    """Which perplexity a record has, as `Evaluation.protocol`."""
    asked = record.evaluation
    text = str(asked.get("text_sha256") or asked.get("text"))
    return (text, asked.get("n_windows"), asked.get("seqlen"), asked.get("dtype"))


def pareto(points: Sequence[Point]) -> Figure | None:
    """Perplexity against stored bytes, or the relative error where most have none; None for a single point."""
    by_ppl = [point for point in points if point.ppl is not None]
    compressed = [point for point in points if point.group != DENSE]
    if 2 * sum(point.ppl is not None for point in compressed) > len(compressed):
        title, shown = "perplexity", [(point, float(point.ppl or 0.0)) for point in by_ppl]
    else:
        title = "relative error"
        shown = [(point, point.rel_error) for point in points if point.rel_error is not None]
    if len(shown) < 2:
        return None
    best = unbeaten(shown, _place)
    rows = [
        {
            "label": point.label,
            "group": point.group,
            "mb": rounded(point.stored_bytes / 1e6),
            "value": rounded(value),
            "best": (point, value) in best,
        }
        for point, value in sorted(shown, key=_place)
    ]
    values = [value for _, value in shown]
    log = min(values) > 0 and max(values) > 8 * min(values)
    front = [f"{row['label']} ({row['mb']:g} MB, {row['value']:.4g})" for row in rows if row["best"]]
    words = f"{title.capitalize()} against stored megabytes of {len(rows)} models. No other beats: {', '.join(front)}."
    if left := len(points) - len(rows):
        words += f" Left out, as {'they have' if left > 1 else 'it has'} no such {title}: {left}."
    spec = plotting.pareto(rows, title, log=log)
    return Figure("pareto", f"{title} against stored bytes", words, spec)


def _place(shown: tuple[Point, float]) -> tuple[int, float]:
    return shown[0].stored_bytes, shown[1]


def _layer(cell: dict[str, Any]) -> int:
    layer: int = cell["layer"]
    return layer


def _cells(records: Sequence[TensorRecord], value_of: Any) -> list[dict[str, Any]]:
    """Means by layer and projection of the values that are not None, attention first as a block computes it."""
    placed = [(*place_of(record.name), value_of(record)) for record in records]
    rows = [
        (layer, projection, value) for layer, projection, value in placed if layer is not None and value is not None
    ]
    short = short_names(sorted({projection for _, projection, _ in rows}, key=_order))
    rows.sort(key=lambda row: (list(short).index(row[1]), row[0]))
    return mean_cells((layer, short[projection], value) for layer, projection, value in rows)


def _order(projection: str) -> tuple[int, int, str]:
    """Attention before the rest, and q, k, v, o as everyone writes them."""
    attention = "attn" in projection or "attention" in projection
    letters = "qkvo" if attention else "gud"
    word = projection.rpartition(".")[2]
    place = letters.find(word[0]) if word[:2] != "dense" else len(letters)
    return (0 if attention else 1, place if place >= 0 else len(letters), projection)


def _extremes(cells: Sequence[dict[str, Any]]) -> str:
    low, high = (pick(cells, key=lambda cell: cell["value"]) for pick in (min, max))
    if low["value"] == high["value"]:
        return f"{low['value']:.4g} everywhere"
    where = [f"{c['value']:.4g} ({c['projection']}, layer {c['layer']})" for c in (low, high)]
    return f"from {where[0]} to {where[1]}"


def _spectrum(detail: TensorDetail) -> Figure:
    rows = [
        {"part": part, "index": index, "sigma": sigma}
        for part, points in detail.spectra.items()
        for index, sigma in points
    ]
    rank = detail.record.rank
    shares = ", ".join(f"{part}: {share:.1%}" for part, share in detail.energy.items() if part != "B @ A")
    words = f"Singular values of {detail.record.name}. Share of the squared norm in the leading {rank}: {shares}."
    spec = plotting.spectrum(rows, rank)
    return Figure("spectrum", "singular values", words, spec)


def _convergence(detail: TensorDetail) -> Figure:
    rows, words = [], []
    for norm, group in groupby(detail.trace, key=lambda row: row[1]):
        trace = list(group)
        step = -(-len(trace) // MAX_ITERATIONS)
        kept = trace[::step] if (len(trace) - 1) % step == 0 else [*trace[::step], trace[-1]]
        rows += [{"iteration": t, "norm": norm, "value": rounded(value)} for t, _, value in kept]
        words.append(f"{norm} from {trace[0][2]:.4g} at iteration {trace[0][0]} to {trace[-1][2]:.4g}")
    spec = plotting.convergence(rows)
    sentence = f"Norms against the iteration of {detail.record.name}: {'; '.join(words)}."
    return Figure("convergence", "convergence", sentence, spec)


def _mask(detail: TensorDetail) -> Figure:
    kept = sum(line.count("1") for line in detail.tile)
    d_out, d_in = len(detail.tile), len(detail.tile[0])
    words = (
        f"Upper left {d_out} × {d_in} entries of the mask of {detail.record.name}: {kept} of {d_out * d_in} are kept "
        f"({kept / (d_out * d_in):.1%})."
    )
    return Figure("mask", "mask", words, plotting.mask_tile(detail.tile))
