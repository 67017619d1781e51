"""`mendlm inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mendlm.cli._console import (
    Column,
    format_bytes,
    format_float,
    format_percent,
    format_shape,
    json_only,
    print_facts,
    print_json,
    print_table,
)
from mendlm.cli._options import JsonOption, TracebackOption

if TYPE_CHECKING:
    from torch import Tensor

    from mendlm.inspection import InspectedTensor, Inspection, Spectrum

EXAMPLES = """[bold]Examples[/bold]

[dim]Every tensor with its shape, kept entries, rank, bytes, relative error and energy, and the totals:[/dim]

[green]mendlm inspect out[/green]

[dim]The singular values of one weight, of S and of B @ A:[/dim]

[green]mendlm inspect out --tensor model.layers.0.mlp.up_proj.weight[/green]

[dim]The five worst tensors:[/dim]

[green]mendlm inspect out --json | jq '.tensors | map(select(.rel_error)) | sort_by(-.rel_error) | .[:5]'[/green]"""

_COLUMNS = (
    Column("tensor", is_number=False),
    Column("shape"),
    Column("dtype", is_number=False),
    Column("n_kept"),
    Column("sparsity"),
    Column("rank"),
    Column("dense"),
    Column("stored"),
    Column("rel_error"),
    Column("energy"),
)
_TITLES = {"sigma": "W", "sigma_sparse": "S", "sigma_low_rank": "B @ A"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_LINE_WIDTH = 48


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|OUT", help="A folder, dense or compressed.", show_default=False)
    ],
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Show the singular values of this weight.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show what is in a checkpoint: a table of all tensors from headers and records, or the spectrum of one weight."""
    with json_only(as_json):
        from mendlm import inspection

        found = inspection.inspect(model) if tensor is None else inspection.tensor_spectrum(model, tensor)
    if as_json:
        print_json(found.to_dict())
    elif isinstance(found, inspection.Spectrum):
        _show_spectrum(found)
    else:
        _show_table(found)


def _show_table(found: Inspection) -> None:
    totals = found.totals
    footer = ["total"] + [""] * 5 + [format_bytes(totals.dense_bytes), format_bytes(totals.stored_bytes), "", ""]
    print_table(_COLUMNS, [_row(tensor) for tensor in found.tensors], footer=footer)
    facts = [
        ("folder", str(found.path)),
        ("layout", found.layout),
        ("model_type", found.model_type or "unknown"),
        ("tensors", f"{totals.n_tensors:,}, {totals.n_compressed:,} of them compressed"),
        ("parameters", f"{totals.dense_params:,}, {totals.stored_params:,} stored"),
        ("bytes", f"{totals.dense_bytes:,} dense, {totals.stored_bytes:,} stored ({format_percent(totals.ratio)})"),
    ]
    if found.recipe is not None:
        facts.append(("recipe", _recipe_line(found.recipe)))
    print_facts(facts)


def _recipe_line(recipe: Mapping[str, Any]) -> str:
    """What was chosen, without the fields left empty."""
    from mendlm.config import parse_pattern

    shown: dict[str, Any] = {**recipe, "pattern": parse_pattern(recipe["pattern"])}
    calibration = recipe.get("calibration")
    if calibration is None:
        shown = {name: value for name, value in shown.items() if name not in ("metric", "damping", "dead_columns")}
    else:
        size = f"{calibration['n_sequences']} × {calibration['seqlen'] or 'default'}"
        shown["calibration"] = f"{calibration['source']} ({size}, {calibration['propagate']})"
    chosen = {name: value for name, value in shown.items() if value not in (None, [], {})}
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def _row(tensor: InspectedTensor) -> list[str]:
    return [
        tensor.name,
        format_shape(tensor.shape),
        tensor.dtype,
        "" if tensor.n_kept is None else f"{tensor.n_kept:,}",
        format_percent(tensor.sparsity),
        "" if tensor.rank is None else str(tensor.rank),
        format_bytes(tensor.dense_bytes),
        format_bytes(tensor.stored_bytes),
        format_float(tensor.rel_error),
        format_percent(tensor.energy_frac),
    ]


def _show_spectrum(found: Spectrum) -> None:
    from mendlm.inspection import energy_frac

    parts = found.parts()
    norms = ", ".join(f"{_TITLES[name]} {float(sigma.double().norm()):.4g}" for name, sigma in parts.items())
    facts = [
        ("tensor", found.name),
        ("shape", f"{format_shape(found.shape)} {found.dtype}, {found.layout}"),
        ("n_kept", f"{found.n_kept:,} (sparsity {format_percent(found.sparsity)})"),
    ]
    if found.rank is not None:
        facts.append(("W", f"S + B @ A, rank of B @ A {found.rank}"))
    facts.append(("norm", norms))
    facts += [(f"sigma {_TITLES[name]}", sparkline(sigma)) for name, sigma in parts.items() if sigma.numel()]
    print_facts(facts)
    columns = [Column("r")]
    for name in parts:
        columns += [Column(f"sigma_r {_TITLES[name]}"), Column("energy")]
    energies = {name: energy_frac(sigma) for name, sigma in parts.items()}
    rows = []
    for r in _ranks(len(found.sigma), found.rank):
        row = [str(r)]
        for name, sigma in parts.items():
            pair = (float(sigma[r - 1]), float(energies[name][r - 1])) if r <= len(sigma) else (None, None)
            row += [format_float(pair[0]), format_percent(pair[1])]
        rows.append(row)
    print_table(columns, rows, title="energy: share of the squared norm in the leading r singular values")


def _ranks(largest: int, rank: int | None) -> list[int]:
    """1, 2, 4, 8, …, the largest, and the rank of B @ A."""
    powers = [1 << i for i in range(largest.bit_length())]
    return sorted({*powers, largest, rank or largest} - {0})


def sparkline(sigma: Tensor) -> str:
    """Non-increasing `sigma` (r,) as a line of at most 48 blocks, each the mean of its share of the values."""
    top = float(sigma[0])
    pieces = sigma.double().tensor_split(min(_LINE_WIDTH, sigma.numel()))
    heights = [float(piece.mean()) / top if top else 0.0 for piece in pieces]
    return "".join(_BLOCKS[min(int(height * len(_BLOCKS)), len(_BLOCKS) - 1)] for height in heights)
