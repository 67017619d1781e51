"""What the pictures of docs/ share: colours, and how a chart becomes a small SVG that is the same every time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt

from _common import ROOT
from mendlm import plotting

IMAGES = ROOT / "docs" / "images"
# Okabe-Ito colours: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6f6f6f"


def lines(
    rows: Iterable[dict[str, Any]],
    x: str,
    y: str,
    *,
    colours: dict[str, str],
    title: str,
    logs: str = "",
    points: bool = False,
    dashed: tuple[str, ...] = (),
) -> alt.Chart:
    """Lines over rows with the fields "x", "y" and "what"; `logs` names the axes with a logarithmic scale."""
    names = list(colours)
    legend = alt.Legend(title=None, orient="top-right" if "y" not in logs else "bottom-left", fillColor="white")
    dash = [[4, 3] if name in dashed else [1, 0] for name in names]
    return (
        alt.Chart(alt.Data(values=list(rows)), title=title, width=340, height=220)
        .mark_line(point={"size": 22} if points else False, strokeWidth=1.8)
        .encode(
            x=alt.X("x:Q", title=x, scale=scale("x" in logs), axis=alt.Axis(grid=False, tickCount=6)),
            y=alt.Y("y:Q", title=y, scale=scale("y" in logs), axis=alt.Axis(tickCount=5)),
            color=alt.Color(
                "what:N", sort=names, scale=alt.Scale(domain=names, range=list(colours.values())), legend=legend
            ),
            strokeDash=alt.StrokeDash("what:N", sort=names, scale=alt.Scale(domain=names, range=dash), legend=legend),
        )
    )


def scale(log: bool) -> alt.Scale:
    """Logarithmic, or linear without being forced through zero."""
    return alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)


def side_by_side(*charts: alt.Chart | alt.LayerChart) -> alt.HConcatChart:
    """Charts in one picture, each with its own scales and legend."""
    return alt.hconcat(*charts, spacing=28).resolve_scale(color="independent", strokeDash="independent")


def save(chart: alt.TopLevelMixin, name: str) -> Path:
    """Write docs/images/`name`.svg, on white so that it can be read on a dark page too."""
    path = IMAGES / f"{name}.svg"
    plotting.save(chart.to_dict(), path)
    return path
