"""`mendlm import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mendlm.cli._console import format_bytes, format_float, format_seconds, json_only, print_facts, print_json
from mendlm.cli._options import JsonOption, OverwriteOption, TracebackOption

EXAMPLES = """[bold]Examples[/bold]

[green]mendlm import SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M[/green]

[green]mendlm import model.gguf model-bf16 --dtype bfloat16[/green]"""


def import_gguf(
    gguf_file: Annotated[Path, typer.Argument(metavar="GGUF_FILE", help="The .gguf file.", show_default=False)],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Storage dtype: float32 (exact), bfloat16 or float16. Default: float32.",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Turn a GGUF file into a transformers checkpoint: dequantize, write safetensors, reload, compare every tensor."""
    with json_only(as_json):
        from mendlm.gguf import import_gguf as run_import

        result = run_import(gguf_file, dest, dtype=dtype, overwrite=overwrite)
    if as_json:
        print_json(result.to_dict())
        return
    print_facts(
        [
            ("architecture", result.architecture),
            ("tensors", f"{result.n_tensors} ({result.n_parameters:,} parameters)"),
            ("verified", f"every tensor equals the file's, read with: {result.verified_against}"),
            ("rounding", f"at most {format_float(result.max_rounding)}, by storing in {result.dtype}"),
            ("bytes", f"{format_bytes(result.source_bytes)} before, {format_bytes(result.output_bytes)} after"),
            ("time", format_seconds(result.seconds)),
            ("out", str(result.path)),
        ]
    )
