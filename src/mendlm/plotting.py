"""Pictures, drawn with matplotlib, which the extra `mendlm[plot]` brings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mendlm.errors import MissingDependencyError, StorageError, UsageError

if TYPE_CHECKING:
    from mendlm.budget_planning import BudgetPlan, PlannedBudget

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise unless a picture can be drawn and the name of its file says how.

    Raises
    ------
    UsageError : another ending than .png, .svg or .pdf.
    MissingDependencyError : matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"a plot is a .png, .svg or .pdf file, got {str(path)!r}.")
    _matplotlib("matplotlib")


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
    layers = sorted({tensor.layer for tensor in placed if tensor.layer is not None})
    columns = list(dict.fromkeys(column_of(tensor) for tensor in placed))
    with _matplotlib("matplotlib").rc_context({"svg.hashsalt": "mendlm"}):
        height = 1.8 + 0.16 * max(len(layers), 8)
        figure = _matplotlib("matplotlib.figure").Figure(figsize=(4.6 * len(panels), height), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, values) in zip(axes, panels, strict=True):
            image = axis.imshow(_means(placed, values, layers, columns), aspect="auto", cmap="viridis")
            axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
            step = -(-len(layers) // 16)
            axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            axis.set_ylabel("layer")
            axis.set_title(title)
            figure.colorbar(image, ax=axis)
        figure.suptitle(f"{plan.target.name} {plan.target.value:g}, {plan.plan.totals.ratio:.1%} of the dense bytes")
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, metadata=metadata, dpi=150)
        except OSError as err:
            raise StorageError(f"cannot write the plot {str(path)!r}: {err.strerror or err}.") from err


def column_of(tensor: PlannedBudget) -> str:
    """The name of a projection without its path: "up_proj", also of every expert."""
    return tensor.projection.rpartition(".")[2]


def _means(
    placed: Sequence[PlannedBudget], values: Sequence[float], layers: Sequence[int], columns: Sequence[str]
) -> list[list[float]]:
    """Rows of layers, columns of projections; NaN where a layer has no such projection."""
    cells: dict[tuple[int | None, str], list[float]] = {}
    for tensor, value in zip(placed, values, strict=True):
        cells.setdefault((tensor.layer, column_of(tensor)), []).append(value)
    return [
        [sum(cell) / len(cell) if (cell := cells.get((layer, column))) else float("nan") for column in columns]
        for layer in layers
    ]


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as err:
        raise MissingDependencyError(
            "a plot needs matplotlib, which is not installed. Run: pip install 'mendlm[plot]'."
        ) from err
