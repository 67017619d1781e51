"""`mendlm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mendlm.cli._console import format_bytes, format_percent, format_seconds, json_only, print_facts, print_json
from mendlm.cli._options import JsonOption, OverwriteOption, TracebackOption
from mendlm.cli._progress import counted, progress_view
from mendlm.errors import UsageError

EXAMPLES = """[bold]Examples[/bold]

[dim]An ordinary checkpoint, for programs that know nothing of mendlm:[/dim]

[green]mendlm export out out-dense --to dense[/green]

[dim]S and a LoRA adapter for PEFT; with one rank for all layers, as vLLM wants it:[/dim]

[green]mendlm export out out-peft --to peft --uniform-rank auto[/green]

[dim]With measured perplexities in the model card:[/dim]

[green]mendlm eval out --text test.parquet --json > ppl.json[/green]

[green]mendlm export out out-dense --to dense --evaluation ppl.json[/green]"""


def export(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that compress wrote.", show_default=False)],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="LAYOUT", help="dense, peft, semi-structured or safetensors-factored.", show_default=False
        ),
    ],
    uniform_rank: Annotated[
        str | None,
        typer.Option(
            "--uniform-rank",
            metavar="N|auto",
            help="peft: zero-pad every factor to this rank; auto: the smallest that vLLM serves.",
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            "--base-name", metavar="NAME", help="peft: what the adapter calls its base model. Default: DEST/base."
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            metavar="FILE",
            help="What 'mendlm eval --json' printed, for the model card; can be given more than once.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Write a compressed folder in another layout, with a model card. S and its factors stay together."""
    with json_only(as_json) as stream:
        from mendlm.exporting import export as run_export

        with progress_view(stream, "export") as view:

            def on_layer(done: int, total: int, name: str) -> None:
                view.advanced(done, total, f"{counted(done, total)} {name}")

            result = run_export(
                out,
                dest,
                to,
                uniform_rank=_rank(uniform_rank),
                base_name=base_name,
                evaluations=evaluation or (),
                overwrite=overwrite,
                progress=on_layer,
            )
    if as_json:
        print_json(result.to_dict())
        return
    sizes = [
        f"{format_bytes(n)} ({format_percent(n / result.dense_bytes)} of the original)"
        for n in (result.packed_bytes, result.output_bytes)
    ]
    print_facts(
        [
            ("layout", result.layout),
            ("layers", f"{result.n_layers} compressed"),
            ("compressed", sizes[0]),
            ("exported", sizes[1]),
            ("time", format_seconds(result.seconds)),
            ("out", str(result.path)),
        ]
    )


def _rank(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError as err:
        raise UsageError(f"--uniform-rank is {text!r}; it must be a whole number or auto.") from err
