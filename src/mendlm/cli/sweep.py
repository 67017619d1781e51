"""`mendlm sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli._console import (
    Column,
    console_for,
    format_bytes,
    format_percent,
    format_seconds,
    json_only,
    print_facts,
    print_json,
    print_table,
    safe,
)
from mendlm.cli._errors import FAILED
from mendlm.cli._options import JsonOption, TracebackOption, WorkDeviceOption
from mendlm.cli._progress import counted, progress_view

if TYPE_CHECKING:
    from mendlm.sweeping import PointDone, SweepEvent, SweepPlan, SweepResult

EXAMPLES = """[bold]Examples[/bold]

[dim]A grid file is a recipe with a section that says what varies:[/dim]

[green]calibration: {source: my.jsonl, n_sequences: 16, seqlen: 1024}[/green]
[green]sweep:[/green]
[green]  axes:[/green]
[green]    criterion: \\[magnitude, wanda][/green]
[green]    pattern: \\[2:4, {sparsity: 0.5}][/green]
[green]    refiner: \\[none, tlr, accelerated-tlr][/green]
[green]    rank: \\[8, 16][/green]

[dim]The points and their bytes; nothing is written:[/dim]

[green]mendlm sweep grid.yaml SmolLM2-135M sweep --text test.parquet --dry-run[/green]

[dim]Run them, for an hour; the same command goes on from there:[/dim]

[green]mendlm sweep grid.yaml SmolLM2-135M sweep --text test.parquet --n-windows 8 --minutes 60[/green]

[dim]Two at a time; the compressed models that none beats stay:[/dim]

[green]mendlm sweep grid.yaml SmolLM2-135M sweep --text test.parquet --workers 2 --keep pareto[/green]"""

_ON, _RUN = "What to evaluate on", "Run and output"


def sweep(
    ctx: typer.Context,
    grid: Annotated[
        Path,
        typer.Argument(metavar="SWEEP.yaml", help="A recipe with a section 'sweep', YAML or JSON.", show_default=False),
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense checkpoint folder.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(metavar="OUT_DIR", help="Folder of the records; goes on if there are.", show_default=False)
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Text: .txt, .jsonl or .parquet.", rich_help_panel=_ON),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="A named data set: wikitext2.", rich_help_panel=_ON)
    ] = None,
    n_windows: Annotated[
        int | None,
        typer.Option(
            "--n-windows", min=1, metavar="N", help="Only the first N windows. Default: all.", rich_help_panel=_ON
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen",
            min=2,
            metavar="N",
            help="Tokens a window. Default: 2048, or the model's maximum if less.",
            rich_help_panel=_ON,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, metavar="N", help="Start no point after this.", rich_help_panel=_RUN),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, metavar="N", help="Points at a time.", rich_help_panel=_RUN)
    ] = 1,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            metavar="WHICH",
            help="Compressed models that stay: none, pareto (those that none beats) or all.",
            rich_help_panel=_RUN,
        ),
    ] = "none",
    device: WorkDeviceOption = "cpu",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the points, their bytes and which are done; write nothing.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Compress a model by every recipe of a grid, evaluate each, and show which give the most for their bytes.

    Every point is checked before the first one starts. What is done is never done again: the same command goes on,
    after Ctrl-C or with more points in the file.
    """
    where = {"text": text, "dataset": dataset, "n_windows": n_windows, "seqlen": seqlen, "device": device}
    with json_only(as_json) as stream:
        from mendlm.sweeping import plan_sweep
        from mendlm.sweeping import sweep as run_sweep

        if dry_run:
            planned = plan_sweep(grid, model, out, **where)  # type: ignore[arg-type]
        else:
            ctx.find_root().obj.interrupt_hint = "Run the same command to go on; what is done is not done again."
            with progress_view(stream, "sweep") as view:

                def on_event(event: SweepEvent) -> None:
                    from mendlm.sweeping import PointDone, PointNote

                    if isinstance(event, PointDone):
                        view.advanced(event.n_done, event.n_points, _line(event))
                    else:
                        what = f": {event.what}" if isinstance(event, PointNote) else ""
                        view.started(f"{event.name}{what}", event.n_done, event.n_points)

                how = {"workers": workers, "minutes": minutes, "keep": keep}
                result = run_sweep(grid, model, out, on_event=on_event, **where, **how)  # type: ignore[arg-type]
    if as_json:
        print_json(planned.to_dict() if dry_run else result.to_dict())
    elif dry_run:
        _show_plan(planned)
    else:
        _show(result)
    if not dry_run and result.failed:
        _say_failed(result)
        raise typer.Exit(FAILED)


def _line(event: PointDone) -> str:
    record = event.record
    head = f"{counted(event.n_done, event.n_points)} {record.name}"
    if record.status == "failed":
        return f"{head}  failed: {record.error}"
    return (
        f"{head}  ppl {record.ppl:.4f}  {format_bytes(record.stored_bytes)} ({format_percent(record.ratio)})  "
        f"{format_seconds((record.seconds or 0) + (record.eval_seconds or 0))}"
    )


def _show(result: SweepResult) -> None:
    from mendlm.sweeping.tables import HEADS, rows_of

    print_table([Column(head, head not in ("", "point")) for head in HEADS], rows_of(result.records))
    facts = [("*", "no other point is better in both bytes and perplexity")]
    facts += [("skipped", f"{skip.name}: {skip.reason}") for skip in result.skipped]
    if result.left:
        facts.append(("left", f"{len(result.left)} points; run the same command to go on"))
    print_facts([*facts, ("out", str(result.out))])


def _show_plan(planned: SweepPlan) -> None:
    rows = []
    for point in planned.points:
        done = planned.records.get(point.key)
        ppl = "" if done is None else f"{done.ppl:.2f}"
        bytes_ = [format_bytes(point.totals.stored_bytes), format_percent(point.totals.ratio)]
        rows.append([point.name, *bytes_, "missing" if done is None else "done", ppl])
    heads = [Column("point", False), Column("bytes"), Column("of dense"), Column("", False), Column("ppl")]
    print_table(heads, rows)
    facts = [("points", f"{len(planned.points)}, {len(planned.missing)} of them missing")]
    facts += [("skipped", f"{skip.name}: {skip.reason}") for skip in planned.skipped]
    print_facts([*facts, ("dry run", "nothing was written")])


def _say_failed(result: SweepResult) -> None:
    console = console_for(sys.stderr)
    for record in result.failed:
        console.print(f"failed: {safe(record.name)}: {safe(record.error)}", soft_wrap=True)
    n_points = len(result.records) + len(result.left)
    console.print(f"{len(result.failed)} of {n_points} points failed; the same command tries them again.")
