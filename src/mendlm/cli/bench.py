"""`mendlm bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli._console import (
    Column,
    console_for,
    format_bytes,
    format_float,
    format_seconds,
    json_only,
    print_json,
    print_table,
    safe,
)
from mendlm.cli._options import ComputeDtypeOption, DeviceOption, JsonOption, TracebackOption
from mendlm.cli._progress import ProgressView, counted, progress_view

if TYPE_CHECKING:
    from mendlm.speed import BenchResult, RowDone, RowStarted, SpeedRow

EXAMPLES = """[bold]Examples[/bold]

[dim]All runtimes of a compressed folder beside the original:[/dim]

[green]mendlm bench out --dense SmolLM2-135M[/green]

[dim]Two of them, four sequences at a time, on one thread:[/dim]

[green]mendlm bench out --runtimes merged,packed --batch-size 4 --threads 1[/green]

[dim]For a script:[/dim]

[green]mendlm bench out --json | jq '.rows[] | {name, decode_tokens_per_second}'[/green]"""


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, compressed or dense.", show_default=False)],
    runtimes: Annotated[
        str | None,
        typer.Option(
            "--runtimes",
            metavar="R,S,…",
            help="merged, factored, packed, semi-structured. Default: all, and why one cannot run.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            "--dense",
            metavar="FOLDER",
            help="The original. Default: the merged runtime stands for it.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Read at once: prefill.")
    ] = 512,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, metavar="N", help="Read one by one with a cache: decode.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Sequences side by side.")] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="N", help="Rounds after the first; the median counts.")
    ] = 3,
    dtype: ComputeDtypeOption = None,
    device: DeviceOption = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, metavar="N", help="On the CPU. Default: torch's choice.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure speed, memory and load time of each runtime, in a process of its own, against the dense model."""
    with json_only(as_json) as stream:
        from mendlm.speed import bench as run_bench

        with progress_view(stream, "bench") as view:
            result = run_bench(
                model,
                runtimes=None if runtimes is None else [name.strip() for name in runtimes.split(",") if name.strip()],
                dense=dense,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                batch_size=batch_size,
                repeats=repeats,
                dtype=dtype,
                device=device,
                threads=threads,
                progress=_on_row(view),
            )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _on_row(view: ProgressView) -> Callable[[RowStarted | RowDone], None]:
    from mendlm.speed import RowStarted as Started

    def on_row(event: RowStarted | RowDone) -> None:
        if isinstance(event, Started):
            view.started(event.name, event.index - 1, event.n_rows)
        else:
            how = "measured" if event.row.unavailable is None else "cannot run here"
            view.advanced(event.index, event.n_rows, f"{counted(event.index, event.n_rows)} {event.row.name} {how}")

    return on_row


def _show(result: BenchResult) -> None:
    how = result.settings
    n = how["threads"]
    threads = f", {n} thread{'' if n == 1 else 's'}" if how["device"] == "cpu" else ""
    title = (
        f"{result.model}: {how['prompt_tokens']} prompt tokens, {how['new_tokens']} new ones, batch "
        f"{how['batch_size']}; {how['dtype']} on {result.machine['device_name']}{threads}; medians of {how['repeats']}"
    )
    columns = [
        Column("runtime", is_number=False),
        *(Column(name) for name in ("prefill tok/s", "× dense", "decode tok/s", "× dense")),
        *(Column(name) for name in ("weights", "peak memory", "load", "files")),
    ]
    print_table(columns, [_cells(row) for row in result.rows], title=title)
    _show_notes(result.rows, result.baseline)


def _cells(row: SpeedRow) -> Sequence[str]:
    peak = row.peak_memory_bytes if row.peak_device_bytes is None else row.peak_device_bytes
    return [
        row.name,
        format_float(row.prefill_tokens_per_second, 3),
        format_float(row.prefill_ratio, 3),
        format_float(row.decode_tokens_per_second, 3),
        format_float(row.decode_ratio, 3),
        format_bytes(row.weights_bytes),
        format_bytes(peak),
        "" if row.load_seconds is None else format_seconds(row.load_seconds),
        format_bytes(row.file_bytes),
    ]


def _show_notes(rows: Sequence[SpeedRow], baseline: str) -> None:
    console = console_for(sys.stdout)
    if baseline == "merged":
        line = "merged stands for the dense model in × dense; --dense FOLDER measures the original."
        console.print(line, soft_wrap=True)
    for row in rows:
        if row.unavailable is not None:
            console.print(f"{row.name} cannot run here: {safe(row.unavailable)}", soft_wrap=True)
