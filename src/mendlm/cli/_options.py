"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from mendlm.cli._errors import Session


def _remember_traceback(ctx: typer.Context, value: bool) -> bool:
    if value and isinstance(ctx.find_root().obj, Session):
        ctx.find_root().obj.traceback = True
    return value


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; progress goes to stderr.", show_default=False)
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output folder holds.", show_default=False)
]
TracebackOption = Annotated[
    bool,
    typer.Option(
        "--traceback",
        callback=_remember_traceback,
        is_eager=True,
        help="Show the Python traceback of an error (also: MENDLM_TRACEBACK=1).",
        show_default=False,
    ),
]
_DEVICE = typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N. Default: cpu.", show_default=False)
DeviceOption = Annotated[str | None, _DEVICE]
WorkDeviceOption = Annotated[str, _DEVICE]  # "cpu" unless it is given
ComputeDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16. Default: float32 on a CPU, else the checkpoint's.",
        show_default=False,
    ),
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        metavar="NAME",
        help="How a compressed folder runs: auto, merged, factored, packed, semi-structured.",
        show_default=False,
    ),
]
