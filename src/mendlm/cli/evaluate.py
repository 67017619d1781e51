"""`mendlm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mendlm.cli import _eval_tasks as of_tasks
from mendlm.cli._eval_text import run_text
from mendlm.cli._options import ComputeDtypeOption, DeviceOption, JsonOption, RuntimeOption, TracebackOption
from mendlm.errors import UsageError

EXAMPLES = f"""[bold]Examples[/bold]

[dim]A compressed folder on a local file, the first 8 windows:[/dim]

[green]mendlm eval out --text test.parquet --n-windows 8[/green]

[dim]The dense original on WikiText-2, fetched by the datasets library:[/dim]

[green]mendlm eval SmolLM2-135M --dataset wikitext2[/green]

[dim]Two compressed folders against their original, on two texts, in one table:[/dim]

[green]mendlm eval out out2 --reference SmolLM2-135M --text test.parquet --text mine.txt[/green]

{of_tasks.EXAMPLES}

[dim]For a script:[/dim]

[green]mendlm eval out --text test.parquet --json | jq .ppl[/green]"""


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders, dense or compressed.", show_default=False)
    ],
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text: .txt, .jsonl or .parquet. Can be given more than once.",
            show_default=False,
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="NAME",
            help="A named data set: wikitext2. Can be given more than once.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="FOLDER",
            help="Compare with this model, token by token: KL divergence, top-1 agreement, paired difference.",
            show_default=False,
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen", min=2, metavar="N", help="Tokens a window. Default: 2048, or the model's maximum if less."
        ),
    ] = None,
    n_windows: Annotated[
        int | None, typer.Option("--n-windows", min=1, metavar="N", help="Only the first N windows. Default: all.")
    ] = None,
    tasks: of_tasks.TasksOption = None,
    task_path: of_tasks.TaskPathOption = None,
    limit: of_tasks.LimitOption = None,
    num_fewshot: of_tasks.NumFewshotOption = None,
    batch_size: of_tasks.BatchSizeOption = None,
    cache: of_tasks.CacheOption = None,
    device: DeviceOption = None,
    dtype: ComputeDtypeOption = None,
    runtime: RuntimeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure perplexity: non-overlapping windows of the text, mean negative log-likelihood per predicted token.

    With its 95 % interval; of several models, with the paired difference from --reference or from the first.
    With --tasks: scores on benchmark tasks instead, by the lm-evaluation-harness.
    """
    for_text = {"--text": texts, "--dataset": datasets, "--reference": reference, "--seqlen": seqlen}
    if of_tasks.wanted(ctx, for_text | {"--n-windows": n_windows}):
        of_tasks.run_tasks(ctx, models, as_json=as_json)
        return
    if not texts and not datasets:
        raise UsageError(
            "eval needs either --text FILE or --dataset NAME, neither was given. Try --dataset wikitext2, or --tasks."
        )
    run_text(
        models,
        texts=texts or [],
        datasets=datasets or [],
        reference=reference,
        seqlen=seqlen,
        n_windows=n_windows,
        device=device,
        dtype=dtype,
        runtime=runtime,
        as_json=as_json,
    )
