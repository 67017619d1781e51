"""`mendlm compress`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

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
from mendlm.cli._options import JsonOption, OverwriteOption, TracebackOption
from mendlm.cli._progress import counted, progress_view
from mendlm.errors import UsageError

if TYPE_CHECKING:
    from mendlm.config import Recipe
    from mendlm.execution import AbstractExecutor
    from mendlm.pipeline import CompressionPlan, CompressionResult, Event, TensorDone
    from mendlm.report.records import Totals

EXAMPLES = """[bold]Examples[/bold]

[dim]Half of the weights, mended with a low-rank part of 5 % of the smaller side:[/dim]

[green]mendlm compress SmolLM2-135M out --sparsity 0.5 --rank 5%[/green]

[dim]The lowest perplexity, on your text, for 2:4:[/dim]

[green]mendlm compress SmolLM2-135M out --preset best --pattern 2:4 --rank 16 --calibration my.jsonl[/green]

[dim]2:4, rank 128, the paper's algorithm with a full SVD in every step:[/dim]

[green]mendlm compress Llama-2-7b out --pattern 2:4 --rank 128 --solver exact[/green]

[dim]What would be done, and how large the result would be; nothing is written:[/dim]

[green]mendlm compress SmolLM2-135M out --recipe recipe.yaml --dry-run[/green]

[dim]A large model on four GPUs:[/dim]

[green]mendlm compress Llama-2-70b out --pattern 2:4 --rank 128 --device cuda:0,1,2,3[/green]

[dim]On the Ray cluster that this machine is part of; all its machines see /shared:[/dim]

[green]mendlm compress /shared/llama out --rank 128 --executor ray[/green]

[dim]Go on after Ctrl-C or a crash:[/dim]

[green]mendlm compress SmolLM2-135M out --sparsity 0.5 --rank 5% --resume[/green]"""


# Options that are fields of a recipe as they are.
_FIELDS = (
    *("criterion", "refiner", "rank", "n_iter", "solver", "metric", "damping", "match_blocks"),
    *("dead_columns", "layer_sparsity", "dtype", "seed"),
)


def compress(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense checkpoint folder.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, or a URL.", show_default=False)],
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
    device: options.DevicesOption = "cpu",
    executor: options.ExecutorOption = "local",
    ray_address: options.RayAddressOption = None,
    workers: options.WorkersOption = None,
    task_timeout: options.TaskTimeoutOption = None,
    overwrite: OverwriteOption = False,
    resume: options.ResumeOption = False,
    dry_run: options.DryRunOption = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Prune a model's block projections and mend each with a low-rank term; only --match-blocks trains anything.

    No text is needed; with --calibration the errors that matter on that text are the ones that are kept small.
    """
    with json_only(as_json) as stream:
        from mendlm.execution import make_executor

        chosen = recipe_of(ctx.params)
        spread = make_executor(executor, workers=workers, task_timeout=task_timeout, ray_address=ray_address)
        if dry_run:
            from mendlm.pipeline import rehearse

            planned = rehearse(model, out, chosen, device=device, executor=spread, overwrite=overwrite, resume=resume)
        else:
            how = "--resume in place of --overwrite" if overwrite else "--resume"
            ctx.find_root().obj.interrupt_hint = (
                f"Run the same command with {how} to go on from the tensors done so far."
            )
            target = _Target(out, device, spread, overwrite, resume, activation_dir)
            result = _run(stream, model, chosen, target)
    if as_json:
        print_json(planned.to_dict() if dry_run else result.to_dict())
    elif dry_run:
        _show_plan(planned)
    else:
        _show_result(result, chosen)


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe that a command's options, by their names, say.

    Raises
    ------
    UsageError : as `resolve_recipe`; or a folder for activations without calibration.
    """
    flags = {name: options[name] for name in _FIELDS}
    flags |= {name: options[name] or None for name in ("include", "exclude")}
    flags["skip_layers"] = parse_layers(options["skip_layers"])
    zeros = Zeros(*(options[name] for name in Zeros._fields))
    text = {name: options[name] for name in ("n_sequences", "seqlen", "windows", "propagate", "batch_size")}
    text = {"source": options["calibration"], **text, "dtype": options["calibration_dtype"]}
    recipe = resolve_recipe(one_source(options["recipe"], options["preset"]), flags, zeros, text)
    if options["activation_dir"] is not None and recipe.calibration is None:
        raise UsageError(
            f"--activation-dir {str(options['activation_dir'])!r} is for calibration, and there is none. "
            "Give --calibration SOURCE, or leave it out."
        )
    return recipe


class Zeros(NamedTuple):
    """The flags that say where the zeros of S are."""

    sparsity: float | None = None
    pattern: str | None = None
    scope: str | None = None
    tile: str | None = None

    def over(self, fields: Mapping[str, Any]) -> object:
        """The recipe's pattern after these flags; None if none was given.

        Raises
        ------
        UsageError : flags that exclude each other.
        """
        if self.pattern is not None:
            for name, value in (("sparsity", self.sparsity), ("scope", self.scope), ("tile", self.tile)):
                if value is not None:
                    raise UsageError(
                        f"--{name} {value} does not go with --pattern {self.pattern}: n:m fixes where the zeros are. "
                        "Leave one of them out."
                    )
            return self.pattern
        given = {"sparsity": self.sparsity, "scope": self.scope, "tile": self.tile}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        if self.scope is not None and self.tile is not None:
            raise UsageError(f"--scope {self.scope} does not go with --tile {self.tile}: tiles compete in the tensor.")
        base = dict(fields["pattern"]) if "sparsity" in fields["pattern"] else {}
        if self.sparsity is None and not base:
            name, value = next(iter(given.items()))
            raise UsageError(f"--{name} {value} does not go with the recipe's n:m pattern. Give --sparsity with it.")
        for one, other in (("scope", "tile"), ("tile", "scope")):
            if one in given:
                base.pop(other, None)
        return base | given


def parse_layers(layers: str | None) -> tuple[int, ...] | None:
    """Block indices of ``"0,1,-1"``.

    Raises
    ------
    UsageError : not whole numbers.
    """
    if layers is None:
        return None
    try:
        return tuple(int(part) for part in layers.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--skip-layers must be whole numbers such as 0,1,-1, got {layers!r}.") from None


def one_source(recipe: str | None, preset: str | None) -> str | None:
    """Where the settings start: a recipe or a preset.

    Raises
    ------
    UsageError : both were given, or no preset has that name.
    """
    from mendlm.recipe_files import preset as preset_named

    if preset is None:
        return recipe
    if recipe is not None:
        raise UsageError(f"--preset {preset} does not go with --recipe {recipe}. Leave one of them out.")
    return preset_named(preset)


def resolve_recipe(
    source: str | None, flags: Mapping[str, Any], zeros: Zeros, text: Mapping[str, Any] | None = None
) -> Recipe:
    """A built-in recipe, that of a file, or the default one, with the flags that are not None put over it.

    A rank, sparsity or pattern holds for every tensor: those of overrides go. A flag that changes the refiner takes the
    old refiner's own settings (n_iter, solver, options) with it, and for one without a low-rank part the rank; one that
    changes the criterion takes its options, the criteria of overrides, and its scope unless a flag says which. Steps of
    block matching leave the other settings of it alone. `text` holds the fields of `Calibration`.

    Raises
    ------
    UsageError : a bad file, a bad value, or flags that exclude each other.
    """
    from mendlm.config import Recipe
    from mendlm.recipe_files import load_recipe, put_over, without_overrides

    fields = (Recipe() if source is None else load_recipe(source)).to_dict()
    given = {name: value for name, value in flags.items() if value is not None}
    calibration = {name: value for name, value in (text or {}).items() if value is not None}
    if calibration:
        if fields["calibration"] is None and "source" not in calibration:
            name, value = next(iter(calibration.items()))
            raise UsageError(
                f"{name} {value!r} is about calibration text, and there is none. Give --calibration SOURCE."
            )
        given["calibration"] = (fields["calibration"] or {}) | calibration
    if given.get("match_blocks") and fields["match_blocks"] is not None:
        given["match_blocks"] = fields["match_blocks"] | {"n_steps": given["match_blocks"]}
    fields = put_over(fields, given)
    for name in ("damping", "dead_columns"):
        if name in given and fields["calibration"] is None:
            raise UsageError(
                f"{name} {given[name]!r} is about calibration, and there is none. Give --calibration SOURCE, or leave "
                "it out."
            )
    pattern = zeros.over(fields)
    if zeros.pattern is not None or zeros.sparsity is not None:
        fields = without_overrides(fields, "pattern", "sparsity")
    return Recipe(**(fields if pattern is None else fields | {"pattern": pattern}))


class _Target(NamedTuple):
    """Where the work runs and where its result goes."""

    out: str
    device: str
    executor: AbstractExecutor
    overwrite: bool
    resume: bool
    activation_dir: Path | None


def _run(stream: TextIO, model: str, recipe: Recipe, target: _Target) -> CompressionResult:
    from mendlm.pipeline import BlockStarted, TensorStarted
    from mendlm.pipeline import compress as run_compress

    with progress_view(stream, "compress") as view:

        def on_event(event: Event) -> None:
            if isinstance(event, BlockStarted):
                view.noted(f"block {event.index}/{event.n_blocks}: {event.phase}")
            elif isinstance(event, TensorStarted):
                view.started(event.name, event.done_bytes, event.total_bytes)
            else:
                view.advanced(event.done_bytes, event.total_bytes, _line(event))

        return run_compress(
            model,
            target.out,
            recipe,
            device=target.device,
            executor=target.executor,
            overwrite=target.overwrite,
            resume=target.resume,
            activation_dir=target.activation_dir,
            on_event=on_event,
        )


def _line(event: TensorDone) -> str:
    record = event.record
    return (
        f"{counted(event.index, event.n_tensors)} {record.name}  {format_shape(record.shape)}  "
        f"n_kept {record.n_kept}  rank {record.rank}  rel_error {format_float(record.rel_error)}  "
        f"{format_seconds(event.seconds)}"
    )


def _show_result(result: CompressionResult, recipe: Recipe) -> None:
    totals, errors = result.totals, [record.rel_error for record in result.records]
    resumed = f", {result.resumed} of them by the interrupted run" if result.resumed else ""
    facts = [
        ("tensors", f"{totals.n_compressed} of {totals.n_tensors} compressed{resumed}"),
        ("bytes", _before_after(totals)),
    ]
    if errors:
        mean, largest = sum(errors) / len(errors), max(errors)
        facts.append(("rel_error", f"mean {format_float(mean)}, max {format_float(largest)}"))
    facts += [*_masks(recipe), ("time", format_seconds(result.seconds)), ("out", str(result.out))]
    print_facts(facts)


def _show_plan(planned: CompressionPlan) -> None:
    columns = [Column("tensor", False), Column("action", False), Column("shape"), Column("n_kept"), Column("rank")]
    rows = []
    for tensor in planned.tensors:
        is_compressed = tensor.action == "compress"
        rows.append(
            [
                tensor.name,
                tensor.action,
                format_shape(tensor.shape),
                f"{tensor.n_kept:,}" if is_compressed else "",
                str(tensor.rank) if is_compressed else "",
                format_bytes(tensor.dense_bytes),
                format_bytes(tensor.stored_bytes),
            ]
        )
    totals = planned.totals
    footer = ["total", "", "", "", "", format_bytes(totals.dense_bytes), format_bytes(totals.stored_bytes)]
    print_table([*columns, Column("before"), Column("after")], rows, footer=footer)
    print_facts(
        [
            ("tensors", f"{totals.n_compressed} of {totals.n_tensors} to compress"),
            ("bytes", _before_after(totals)),
            *_masks(planned.recipe),
            ("dry run", "nothing was written"),
        ]
    )


def _masks(recipe: Recipe) -> list[tuple[str, str]]:
    """Who chose the masks, where it is not the criterion."""
    if not recipe.moves_mask:
        return []
    fields = recipe.to_dict()
    return [("masks", f"chosen by refiner {fields['refiner']}, not by criterion {fields['criterion']}")]


def _before_after(totals: Totals) -> str:
    before, after = format_bytes(totals.dense_bytes), format_bytes(totals.stored_bytes)
    return f"{before} before, {after} after ({format_percent(totals.ratio)})"
