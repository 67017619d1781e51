"""`mendlm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mendlm.cli._console import format_bytes, format_seconds, json_only, print_facts, print_json
from mendlm.cli._options import JsonOption, TracebackOption
from mendlm.cli._progress import counted, progress_view
from mendlm.errors import UsageError

EXAMPLES = """[bold]Examples[/bold]

[dim]A page about one compressed model, with the spectra of W - S before and after:[/dim]

[green]mendlm report out --original SmolLM2-135M -o report.html[/green]

[dim]With perplexities that were measured before:[/dim]

[green]mendlm eval out --text test.parquet --n-windows 8 --json > ppl.json[/green]

[green]mendlm report out --eval ppl.json[/green]

[dim]Several runs side by side, and all charts as .png and .svg:[/dim]

[green]mendlm report out-2-4 out-50 out-60 --text test.parquet --n-windows 2 --figures figures[/green]

[dim]The points of a sweep:[/dim]

[green]mendlm report sweep-out/sweep.jsonl[/green]"""


def report(
    outs: Annotated[
        list[Path],
        typer.Argument(
            metavar="OUT",
            help="Folders that compress wrote; also the folder or sweep.jsonl of a sweep.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    original: Annotated[
        Path | None,
        typer.Option(
            "--original",
            metavar="MODEL",
            help="The dense folder they came from: shows W - S before and after, and how the refinement converged.",
            show_default=False,
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="What 'mendlm eval --json' printed, of a run or of another model; can be given more than once.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Measure perplexity on this text now: .txt, .jsonl or .parquet.",
            show_default=False,
        ),
    ] = None,
    n_windows: Annotated[
        int | None, typer.Option("--n-windows", min=1, metavar="N", help="Only the first N windows of --text.")
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor",
            metavar="NAME",
            help="Show this weight in detail; can be given more than once. Default: those of the middle block.",
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures", metavar="DIR", help="Write the charts there too, as .png and .svg.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the page, and figures of the same names.", show_default=False)
    ] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show what compression did: one HTML file with charts and tables that opens anywhere and asks no network."""
    if n_windows is not None and text is None:
        raise UsageError("--n-windows says how much of --text is measured, and --text is missing. Add --text FILE.")
    with json_only(as_json) as stream:
        from mendlm.report import report as run_report

        with progress_view(stream, "report") as view:

            def on_step(done: int, total: int, what: str) -> None:
                view.advanced(done, total, f"{counted(done, total)} {what}")

            result = run_report(
                outs,
                output,
                original=original,
                evaluations=evaluation or (),
                text=text,
                n_windows=n_windows,
                tensors=tensor or (),
                figures=figures,
                overwrite=overwrite,
                progress=on_step,
            )
    if as_json:
        print_json(result.to_dict())
        return
    n_weights = sum(map(len, result.tensors.values()))
    facts = [
        ("report", f"{result.path} ({format_bytes(result.n_bytes)})"),
        ("in detail", f"{n_weights} weight{'s' if n_weights != 1 else ''}"),
        ("time", format_seconds(result.seconds)),
    ]
    if result.figures:
        facts.insert(1, ("figures", f"{len(result.figures)} files in {result.figures[0].parent}"))
    print_facts(facts)
