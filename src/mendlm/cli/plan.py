"""`mendlm plan`."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli import _compress_options as options
from mendlm.cli._console import (
    Column,
    format_bytes,
    format_float,
    format_percent,
    format_seconds,
    format_shape,
    json_only,
    print_facts,
    print_json,
    print_table,
)
from mendlm.cli._options import JsonOption, TracebackOption, WorkDeviceOption
from mendlm.cli._progress import counted, progress_view
from mendlm.cli.compress import recipe_of
from mendlm.errors import UsageError
from mendlm.paths import check_parent, local_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mendlm.budget_planning import BudgetPlan, PlannedBudget
    from mendlm.measuring import CurvesDone, MeasuringEvent

EXAMPLES = """[bold]Examples[/bold]

[dim]The whole checkpoint in 60 % of its bytes; sparsity and rank chosen for every tensor:[/dim]

[green]mendlm plan SmolLM2-135M --preset best --calibration my.jsonl --target-bytes 0.6 -o budget.yaml[/green]

[green]mendlm compress SmolLM2-135M out --recipe budget.yaml[/green]

[dim]2:4 everywhere; factors of 3 % of the dense bytes, where they save most. Another target then takes seconds:[/dim]

[green]mendlm plan SmolLM2-135M --pattern 2:4 --target-rank-bytes 0.03 --curves curves.json -o budget.yaml[/green]

[dim]The fewest bytes with a total relative error of 20 %, and a picture:[/dim]

[green]mendlm plan SmolLM2-135M --target-error 0.2 --plot budget.svg[/green]"""

_BUDGET = "Budget"


def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense checkpoint folder.", show_default=False)],
    target_bytes: Annotated[
        float | None,
        typer.Option(
            "--target-bytes",
            metavar="SHARE",
            help="Stored bytes of the whole checkpoint, as a share of the dense ones: choose sparsities and ranks.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    target_rank_bytes: Annotated[
        float | None,
        typer.Option(
            "--target-rank-bytes",
            metavar="SHARE",
            help="Bytes of the factors, as a share of the dense ones of the compressed tensors: choose ranks alone.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(
            "--target-error",
            metavar="ERROR",
            help="Total relative error: choose the sparsities and ranks with the fewest bytes.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="Which errors are added up: block (what they change in the outputs of blocks), relative, parameters "
            "(relative, times the size) or absolute. Default: block with calibration, else relative.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    sparsities: Annotated[
        str | None,
        typer.Option(
            "--sparsities",
            metavar="S,T,…",
            help="Sparsities to choose from. Default: 0.3,0.4,…,0.8 and that of the recipe.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    rank_step: Annotated[
        int | None,
        typer.Option(
            "--rank-step", metavar="N", help="Ranks are multiples of it. Default: 4.", rich_help_panel=_BUDGET
        ),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option(
            "--curves",
            metavar="FILE",
            help="Keep the error curves there, also of an interrupted run; what the file has is not measured again.",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the recipe there.", rich_help_panel=_BUDGET),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the allocation as a .png, .svg or .pdf; needs mendlm[plot].",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the recipe file.", rich_help_panel=_BUDGET, show_default=False),
    ] = False,
    preset: options.PresetOption = None,
    recipe: options.RecipeOption = None,
    criterion: options.CriterionOption = None,
    sparsity: options.SparsityOption = None,
    pattern: options.PatternOption = None,
    scope: options.ScopeOption = None,
    tile: options.TileOption = None,
    layer_sparsity: options.LayerSparsityOption = None,
    skip_layers: options.SkipLayersOption = None,
    include: options.IncludeOption = None,
    exclude: options.ExcludeOption = None,
    refiner: options.RefinerOption = None,
    rank: options.RankOption = None,
    n_iter: options.IterationsOption = None,
    solver: options.SolverOption = None,
    metric: options.MetricOption = None,
    damping: options.DampingOption = None,
    match_blocks: options.MatchBlocksOption = None,
    calibration: options.CalibrationOption = None,
    n_sequences: options.SequencesOption = None,
    seqlen: options.SeqlenOption = None,
    windows: options.WindowsOption = None,
    propagate: options.PropagateOption = None,
    batch_size: options.BatchSizeOption = None,
    calibration_dtype: options.CalibrationDtypeOption = None,
    dead_columns: options.DeadColumnsOption = None,
    activation_dir: options.ActivationDirOption = None,
    seed: options.SeedOption = None,
    dtype: options.StorageOption = None,
    device: WorkDeviceOption = "cpu",
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Choose rank and sparsity of every tensor under a budget, as a recipe for compress.

    Error curves of every tensor are measured first; what compress takes says how it would be compressed.
    """
    with json_only(as_json) as stream:
        from mendlm.budget_planning import DEFAULT_RANK_STEP, plan_budget
        from mendlm.plotting import check_plot, plot_budget

        files = {"--curves": curves, "--output": output, "--plot": plot}
        places = {flag: local_path(path) for flag, path in files.items() if path is not None}
        for flag, path in places.items():
            _check_file(flag, path)
        _check_apart(places)
        if output is not None:
            output = places["--output"]
            _check_output(output, overwrite)
        if plot is not None:
            check_plot(plot)
        ctx.find_root().obj.interrupt_hint = (
            "Pass --curves to keep what is measured."
            if curves is None
            else f"Run the same command to go on from the curves in {places['--curves']}."
        )
        with progress_view(stream, "plan") as view:

            def on_event(event: MeasuringEvent) -> None:
                from mendlm.execution.run import BlockStarted, TensorStarted

                if isinstance(event, BlockStarted):
                    view.noted(f"block {event.index}/{event.n_blocks}: {event.phase}")
                elif isinstance(event, TensorStarted):
                    view.started(event.name, event.done_bytes, event.total_bytes)
                else:
                    view.advanced(event.done_bytes, event.total_bytes, _line(event))

            result = plan_budget(
                model,
                recipe_of(ctx.params),
                target_bytes=target_bytes,
                target_rank_bytes=target_rank_bytes,
                target_error=target_error,
                objective=objective,  # type: ignore[arg-type]
                sparsities=_parse_sparsities(sparsities),
                rank_step=DEFAULT_RANK_STEP if rank_step is None else rank_step,
                curves=curves,
                device=device,
                activation_dir=activation_dir,
                on_event=on_event,
            )
        if output is not None:
            _write(result, output)
        if plot is not None:
            plot_budget(result, plot)
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result, output, plot)


def _check_file(flag: str, path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{flag} {str(path)!r} is a folder. Give the name of a file.")
    check_parent(path, f"{flag} {str(path)!r}")


def _check_apart(places: Mapping[str, Path]) -> None:
    for (one, path), (other, second) in combinations(places.items(), 2):
        if os.path.realpath(path) == os.path.realpath(second):
            raise UsageError(f"{one} and {other} name the same file, {str(path)!r}. Choose another name for one.")


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(f"--output {str(path)!r} exists. Pass --overwrite, or choose another name.")
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UsageError(f"--output must be a .yaml, .yml or .json file, got {str(path)!r}.")


def _parse_sparsities(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--sparsities must be numbers such as 0.4,0.5,0.6, got {text!r}.") from None


def _write(result: BudgetPlan, path: Path) -> None:
    from mendlm.checkpoints.finish import to_json
    from mendlm.checkpoints.writer import write_file
    from mendlm.recipe_files import recipe_text

    headline = (
        f"mendlm plan: {result.target.name} {result.target.value:g}, objective {result.objective}; "
        f"{result.plan.totals.ratio:.4f} of the dense bytes."
    )
    text = recipe_text(result.recipe, headline)
    write_file(path, to_json(result.recipe.to_dict()) if path.suffix.lower() == ".json" else text.encode())


def _line(event: CurvesDone) -> str:
    curves = event.curves
    n_ranks = len(curves.ranks)
    return (
        f"{counted(event.index, event.n_tensors)} {curves.name}  {format_shape(curves.shape)}  "
        f"{len(curves.curves)} pattern{'s' if len(curves.curves) > 1 else ''}  "
        f"{n_ranks} rank{'s' if n_ranks > 1 else ''}  {format_seconds(event.seconds)}"
    )


def _show(result: BudgetPlan, output: Path | None, plot: Path | None) -> None:
    from mendlm.plotting import columns_of

    placed = [tensor for tensor in result.tensors if tensor.layer is not None]
    several = len({tensor.pattern for tensor in result.tensors}) > 1
    places = columns_of(placed)
    columns = list(dict.fromkeys(places))
    cells: dict[tuple[int | None, str], list[PlannedBudget]] = {}
    for tensor, column in zip(placed, places, strict=True):
        cells.setdefault((tensor.layer, column), []).append(tensor)
    if placed:
        what = "sparsity (or n:m) and rank" if several else "rank"
        rows = [
            [str(layer), *(_cell(cells.get((layer, column), []), several) for column in columns)]
            for layer in sorted({tensor.layer for tensor in placed if tensor.layer is not None})
        ]
        print_table([Column("layer"), *map(Column, columns)], rows, title=f"{what} by layer and projection")
    others = [tensor for tensor in result.tensors if tensor.layer is None]
    if others:
        names = [Column("tensor", False), Column("chosen")]
        print_table(names, [[tensor.name, _cell([tensor], several)] for tensor in others])
    totals = result.plan.totals
    before, after = format_bytes(totals.dense_bytes), format_bytes(totals.stored_bytes)
    facts = [
        ("target", f"{result.target.name} {result.target.value:g}, objective {result.objective}"),
        ("bytes", f"{before} before, {after} after ({format_percent(totals.ratio)})"),
        ("factors", f"{format_percent(result.rank_ratio)} of the dense bytes of the compressed tensors"),
        ("error", f"{format_float(result.error)} in total, as predicted"),
    ]
    uniform = result.uniform
    if uniform is not None:
        pattern = "the patterns of the recipe, " if uniform.pattern is None else f"{uniform.pattern}, "
        size = f"{format_bytes(uniform.stored_bytes)} after"
        facts.append(("uniform", f"{format_float(uniform.error)} at {pattern}rank {uniform.rank}, {size}"))
    facts.append(("time", format_seconds(result.seconds)))
    facts += [(name, str(path)) for name, path in (("recipe", output), ("plot", plot)) if path is not None]
    print_facts(facts)


def _cell(tensors: Sequence[PlannedBudget], with_pattern: bool) -> str:
    """What one cell of the table says of the tensors in it: of several (experts) the smallest and the largest."""
    if not tensors:
        return ""
    ranks = _range([tensor.rank for tensor in tensors], "d")
    if not with_pattern:
        return ranks
    patterns = {tensor.pattern for tensor in tensors}
    if len(patterns) == 1 and (pattern := next(iter(patterns))).name == "nm":
        return f"{pattern} r{ranks}"
    return f"{_range([tensor.pattern.sparsity for tensor in tensors], '.4g')} r{ranks}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
