"""Charts: rows of plain values in, Vega-Lite specifications out; and those as .png, .svg and .pdf files.

Altair makes the specifications, vl-convert draws them without a browser; the extra `mendlm[plot]` brings both.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mendlm.checkpoints.writer import storage_errors
from mendlm.errors import MissingDependencyError, UsageError
from mendlm.families import place_of, short_names
from mendlm.paths import local_path

if TYPE_CHECKING:
    from mendlm.budget_planning import BudgetPlan, PlannedBudget

Spec = dict[str, Any]
"""A Vega-Lite specification with its data inside."""

FORMATS = (".png", ".svg", ".pdf")

# Every colour of text has a contrast of at least 4.5 with its background, every series of at least 3. Series differ
# in shape or dash as well, and their colours stay apart for the usual kinds of colour blindness (after Okabe and Ito).
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "quiet": "#57606a",
    "grid": "#e3e6ea",
    "c1": "#0072b2",
    "c2": "#c44e00",
    "c3": "#007a5a",
    "c4": "#a8447f",
    "c5": "#806000",
    "c6": "#5b3fb8",
    "c7": "#4a4f55",
}
DARK = {
    "paper": "#14181d",
    "ink": "#e8ebee",
    "quiet": "#a3adb8",
    "grid": "#2c333b",
    "c1": "#56b4e9",
    "c2": "#ff8f52",
    "c3": "#3ccf9e",
    "c4": "#e58fc0",
    "c5": "#f0c040",
    "c6": "#b39dfb",
    "c7": "#c8ccd0",
}
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_WIDTH, _HEIGHT = 460, 280
_ROWS = "rows"


def theme(colours: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """The Vega-Lite config that every chart is drawn with; `colours` as `LIGHT`, a page gives CSS variables."""
    text = {"labelColor": colours["quiet"], "titleColor": colours["ink"], "labelFontSize": 11, "titleFontSize": 12}
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "axis": text
        | {"titleFontWeight": 500, "gridColor": colours["grid"], "domainColor": colours["quiet"]}
        | {"tickColor": colours["grid"], "labelLimit": 220},
        "legend": text | {"titleFontWeight": 500, "symbolStrokeWidth": 2, "labelLimit": 180},
        "title": {"color": colours["ink"], "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "header": {"labelColor": colours["ink"], "titleColor": colours["ink"]},
        "line": {"strokeWidth": 2},
        "point": {"size": 36, "filled": True},
        "rule": {"color": colours["quiet"]},
        "text": {"color": colours["ink"], "fontSize": 11},
        "range": {"category": [colours[name] for name in SERIES], "symbol": _SHAPES},
    }


def heat_map(cells: Sequence[Mapping[str, Any]], title: str, *, number: str = ".3~g", rows: str = "layer") -> Spec:
    """A grid of coloured cells, layers down and projections across.

    Parameters
    ----------
    cells : rows with `layer`, `projection`, `value` and `n`, how many weights the value is the mean of; projections in
        the order in which they are to stand.
    title : of the values, e.g. "relative error".
    number : their format, in the language of d3.
    rows : what the layers are called.
    """
    alt = _altair()
    layers = sorted({cell["layer"] for cell in cells})
    columns = list(dict.fromkeys(cell["projection"] for cell in cells))
    step = -(-len(layers) // 16)
    several = any(cell["n"] > 1 for cell in cells)
    tooltip = [
        alt.Tooltip("layer:O", title=rows),
        alt.Tooltip("projection:N"),
        alt.Tooltip("value:Q", title=title, format=number),
        *([alt.Tooltip("n:Q", title="mean of")] if several else []),
    ]
    return _with(
        cells,
        _chart()
        .mark_rect()
        .encode(
            x=alt.X("projection:N", sort=columns, title=None, axis=alt.Axis(labelAngle=-35, domain=False)),
            y=alt.Y("layer:O", title=rows, axis=alt.Axis(values=layers[::step], domain=False, ticks=False)),
            color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="viridis"), legend=alt.Legend(format=number)),
            tooltip=tooltip,
        )
        .properties(width=_WIDTH, height=max(160, len(layers) * (14 if len(layers) <= 40 else 9)), title=title),
    )


def lines_by(values: Sequence[Mapping[str, Any]], x: str, series: str, title: str, *, legend: str = "top") -> Spec:
    """One line with points for each series, from zero, against whole numbers.

    Parameters
    ----------
    values : rows with `value` and the fields that `x` and `series` name; series in the order of the legend.
    x : what counts, e.g. "layer".
    series : what the lines are told apart by, e.g. "projection".
    title : of the values.
    legend : where it stands.
    """
    alt = _altair()
    names = list(dict.fromkeys(value[series] for value in values))
    return _with(
        values,
        _chart()
        .mark_line(point=True)
        .encode(
            x=_counted(x),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(format="~g")),
            **_series(series, names, "shape", orient=legend),
            tooltip=[f"{series}:N", f"{x}:Q", alt.Tooltip("value:Q", title=title, format=".4~g")],
        )
        .properties(width=_WIDTH, height=_HEIGHT),
    )


def spectrum(values: Sequence[Mapping[str, Any]], rank: int) -> Spec:
    """Singular values against their index, both on log scales, with a rule at the rank.

    Parameters
    ----------
    values : rows with `part`, `index` (from 1) and `sigma` > 0.
    rank : of the low-rank part; no rule for 0.
    """
    alt = _altair()
    parts = list(dict.fromkeys(value["part"] for value in values))
    lines = (
        _chart()
        .mark_line()
        .encode(
            x=alt.X("index:Q", title="index of the singular value", scale=alt.Scale(type="log"), axis=_log_axis()),
            y=alt.Y("sigma:Q", title="singular value", scale=alt.Scale(type="log"), axis=_log_axis()),
            **_series("part", parts, "strokeDash"),
            tooltip=["part:N", alt.Tooltip("index:Q"), alt.Tooltip("sigma:Q", format=".4~g")],
        )
    )
    chart = lines if rank < 1 else alt.layer(lines, *_rule_at(rank))
    return _with(values, chart.properties(width=_WIDTH, height=_HEIGHT))


def convergence(values: Sequence[Mapping[str, Any]]) -> Spec:
    """Norms against the iteration; `values` are rows with `iteration`, `norm` and `value` > 0.

    On a log scale where they span a factor of 20 or more.
    """
    alt = _altair()
    norms = list(dict.fromkeys(value["norm"] for value in values))
    found = [float(value["value"]) for value in values]
    log = bool(found) and max(found) > 20 * min(found)
    scale, axis = (alt.Scale(type="log"), _log_axis()) if log else (alt.Scale(zero=False), alt.Axis(format="~g"))
    y = alt.Y("value:Q", title="Frobenius norm", scale=scale, axis=axis)
    return _with(
        values,
        _chart()
        .mark_line()
        .encode(
            x=_counted("iteration"),
            y=y,
            **_series("norm", norms, "strokeDash"),
            tooltip=["norm:N", "iteration:Q", alt.Tooltip("value:Q", format=".5~g")],
        )
        .properties(width=_WIDTH, height=_HEIGHT),
    )


def mask_tile(bits: Sequence[str]) -> Spec:
    """A picture of a mask: kept entries are dark.

    Parameters
    ----------
    bits : a string of "0" and "1" for each row, "1" = kept, all of one length.
    """
    alt = _altair()
    d_out, d_in = len(bits), len(bits[0]) if bits else 0
    runs = list(_runs(bits))
    side = 280
    axis = alt.Axis(grid=False, domain=False, tickMinStep=1, format="d", tickCount=5)
    x = alt.X("a:Q", title="column", scale=alt.Scale(domain=[0, d_in], nice=False), axis=axis)
    y = alt.Y("r:Q", title="row", scale=alt.Scale(domain=[d_out, 0], nice=False), axis=axis)
    return _with(
        runs,
        _chart()
        .mark_rect(stroke=None)
        .encode(x=x, x2="b:Q", y=y, y2="s:Q", color=alt.value("#0072b2"))
        .properties(width=max(40, round(side * min(1.0, d_in / max(d_out, 1)))), height=side),
    )


def pareto(points: Sequence[Mapping[str, Any]], title: str, *, log: bool = False) -> Spec:
    """Models by stored bytes and quality, lower is better in both; a line through those that no other one beats.

    Parameters
    ----------
    points : rows with `label`, `group`, `mb` (stored megabytes), `value` and `best` (whether it is on the frontier).
    title : of the values.
    log : whether they go on a log scale.
    """
    alt = _altair()
    groups = list(dict.fromkeys(point["group"] for point in points))
    kind = {"type": "log"} if log else {"type": "linear", "zero": False}
    x = alt.X("mb:Q", title="stored MB", scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(format="~g"))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(**kind, padding=18), axis=_log_axis() if log else alt.Axis())
    base = _chart().encode(x=x, y=y)
    front = base.transform_filter("datum.best").mark_line(
        interpolate="step-after", color="#8a929b", strokeDash=[4, 3], strokeWidth=1.5
    )
    dots = base.mark_point(size=80, opacity=1).encode(
        **_series("group", groups, "shape"),
        tooltip=["label:N", alt.Tooltip("mb:Q", title="MB", format=".4~g"), alt.Tooltip("value:Q", format=".5~g")],
    )
    layers = [front, dots]
    if len(points) <= 12:
        layers.append(base.mark_text(dy=-11, limit=160).encode(text="label:N"))
    return _with(points, alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT + 20))


def check_plot(path: Path) -> None:
    """Raise unless a picture can be drawn and the name of its file says how.

    Raises
    ------
    UsageError : another ending than .png, .svg or .pdf.
    MissingDependencyError : Altair or vl-convert is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"a plot is a .png, .svg or .pdf file, got {str(path)!r}.")
    _altair()
    vl_convert()


def save(spec: Spec, path: Path) -> None:
    """Draw a chart into a file on a white background; the same one gives the same SVG.

    Raises
    ------
    UsageError, MissingDependencyError : as `check_plot`.
    StorageError : the file cannot be written.
    """
    check_plot(path)
    path = local_path(path)
    convert, kind = vl_convert(), path.suffix.lower()
    options = {"vl_spec": spec, "config": theme() | {"background": LIGHT["paper"]}}
    if kind == ".svg":
        data = _renumbered(convert.vegalite_to_svg(**options)).encode()
    elif kind == ".png":
        data = convert.vegalite_to_png(**options, scale=2)
    else:
        data = convert.vegalite_to_pdf(**options)
    with storage_errors(path):
        path.write_bytes(data)


def plot_budget(plan: BudgetPlan, path: Path) -> None:
    """Ranks, and sparsities where they differ, by layer and projection, as an image with a colour for each value.

    Tensors outside of the blocks are left out; where a layer has several weights of one name (experts) the mean is
    shown. The same plan gives the same SVG.

    Raises
    ------
    UsageError, MissingDependencyError : as `check_plot`.
    StorageError : the file cannot be written.
    """
    check_plot(path)
    placed = [tensor for tensor in plan.tensors if tensor.layer is not None]
    panels = [("rank", [float(tensor.rank) for tensor in placed])]
    sparsities = [tensor.pattern.sparsity for tensor in placed]
    if len(set(sparsities)) > 1:
        panels.append(("sparsity", sparsities))
    layers, columns = [tensor.layer for tensor in placed], columns_of(placed)
    charts = [heat_map(mean_cells(zip(layers, columns, values, strict=True)), title) for title, values in panels]
    title = f"{plan.target.name} {plan.target.value:g}, {plan.plan.totals.ratio:.1%} of the dense bytes"
    save({"title": title, "hconcat": charts, "resolve": {"scale": {"color": "independent"}}}, path)


def columns_of(tensors: Sequence[PlannedBudget]) -> list[str]:
    """The column of each tensor: the name of its projection as short as it can be, experts together."""
    projections = [place_of(tensor.name)[1] for tensor in tensors]
    short = short_names(projections)
    return [short[projection] for projection in projections]


def mean_cells(rows: Iterable[tuple[int | None, str, float]]) -> list[dict[str, Any]]:
    """Cells of `heat_map` of (layer, projection, value): the mean where a place has several values (experts)."""
    cells: dict[tuple[int | None, str], list[float]] = {}
    for layer, projection, value in rows:
        cells.setdefault((layer, projection), []).append(value)
    return [
        {"layer": layer, "projection": projection, "value": rounded(math.fsum(found) / len(found)), "n": len(found)}
        for (layer, projection), found in cells.items()
    ]


def rounded(value: float) -> float:
    """`value` with five significant digits: what a chart can show."""
    return float(f"{value:.5g}")


def vl_convert() -> Any:
    """The module that draws.

    Raises
    ------
    MissingDependencyError : it is not installed.
    """
    return _required("vl_convert", "vl-convert-python")


def _altair() -> Any:
    return _required("altair", "altair")


def _required(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise MissingDependencyError(
            f"a plot needs {package}, which is not installed. Run: pip install 'mendlm[plot]'."
        ) from err


def _chart() -> Any:
    """A chart of the rows that `_with` puts in."""
    alt = _altair()
    return alt.Chart(alt.NamedData(_ROWS))


def _with(rows: Sequence[Mapping[str, Any]], chart: Any) -> Spec:
    """The specification of a chart with its rows.

    Altair would check and copy every one of the rows, which takes a hundred times as long as all the rest.
    """
    spec: Spec = chart.to_dict(validate=False)
    for part in (spec, *spec.get("layer", ())):
        if part.get("data") == {"name": _ROWS}:
            part["data"] = {"values": list(rows)}
    return {key: value for key, value in spec.items() if key not in ("config", "$schema")}


def _series(field: str, names: Sequence[str], second: str, orient: str = "top") -> dict[str, Any]:
    """A colour, and a shape or a dash, for each of `names`, with one legend: both scales have the same domain."""
    alt = _altair()
    legend = alt.Legend(orient=orient, columns=4)
    options = {"title": None, "scale": alt.Scale(domain=list(names)), "legend": legend}
    kinds = {"shape": alt.Shape, "strokeDash": alt.StrokeDash}
    return {"color": alt.Color(f"{field}:N", **options), second: kinds[second](f"{field}:N", **options)}


def _counted(field: str) -> Any:
    """An axis of whole numbers."""
    alt = _altair()
    return alt.X(f"{field}:Q", title=field, axis=alt.Axis(tickMinStep=1, format="d", grid=False))


def _log_axis() -> Any:
    return _altair().Axis(format="~g", tickCount=6, labelOverlap=True)


def _rule_at(rank: int) -> tuple[Any, Any]:
    alt = _altair()
    base = alt.Chart(alt.InlineData([{"index": rank, "label": f"rank {rank}"}])).encode(x="index:Q")
    words = base.mark_text(align="left", dx=4, dy=-2, baseline="bottom").encode(text="label:N", y=alt.value(_HEIGHT))
    return base.mark_rule(strokeDash=[3, 3]), words


def _renumbered(svg: str) -> str:
    """The ids of gradients and clip paths counted from 0: vl-convert counts on from chart to chart."""
    found: dict[str, str] = {}
    return re.sub(r"\b(gradient|clip)_?\d+\b", lambda m: found.setdefault(m[0], f"{m[1]}_{len(found)}"), svg)


def _runs(bits: Sequence[str]) -> Iterable[dict[str, int]]:
    """Rectangles of kept entries: columns [a, b) of the row [r, s)."""
    for row, line in enumerate(bits):
        column = 0
        for bit, group in groupby(line):
            end = column + len(list(group))
            if bit == "1":
                yield {"r": row, "s": row + 1, "a": column, "b": end}
            column = end
