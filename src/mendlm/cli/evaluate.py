"""`mendlm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli import _eval_tasks as of_tasks
from mendlm.cli._console import format_seconds, json_only, print_facts, print_json
from mendlm.cli._options import ComputeDtypeOption, DeviceOption, JsonOption, RuntimeOption, TracebackOption
from mendlm.cli._progress import progress_view
from mendlm.errors import UsageError

if TYPE_CHECKING:
    from mendlm.evaluation.perplexity import PerplexityResult

EXAMPLES = f"""[bold]Examples[/bold]

[dim]A compressed folder on a local file, the first 8 windows:[/dim]

[green]mendlm eval out --text test.parquet --n-windows 8[/green]

[dim]The dense original on WikiText-2, fetched by the datasets library:[/dim]

[green]mendlm eval SmolLM2-135M --dataset wikitext2[/green]

{of_tasks.EXAMPLES}

[dim]For a script:[/dim]

[green]mendlm eval out --text test.parquet --json | jq .ppl[/green]"""


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="A folder, dense or compressed; several with --tasks.", show_default=False
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Text: .txt, .jsonl or .parquet.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="A named data set: wikitext2.", show_default=False),
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

    With --tasks: scores on benchmark tasks instead, by the lm-evaluation-harness.
    """
    for_text = {"--text": text, "--dataset": dataset, "--seqlen": seqlen, "--n-windows": n_windows}
    if of_tasks.wanted(ctx, for_text):
        of_tasks.run_tasks(ctx, models, as_json=as_json)
        return
    if len(models) != 1:
        raise UsageError(f"a text is measured on one model at a time, got {len(models)}. Only --tasks takes several.")
    if (text is None) == (dataset is None):
        given = "both were given" if text is not None else "neither was given"
        raise UsageError(
            f"eval needs either --text FILE or --dataset NAME, {given}. Try --dataset wikitext2, or --tasks."
        )
    with json_only(as_json) as stream:
        from mendlm.devices import resolve_device
        from mendlm.evaluation.perplexity import evaluate as run_evaluate

        where = None if device is None else resolve_device(device)
        with progress_view(stream, "eval") as view:

            def on_window(done: int, total: int, ppl: float) -> None:
                view.advanced(done, total, f"[{done:>{len(str(total))}}/{total}] ppl so far {ppl:.4f}")

            result = run_evaluate(
                models[0],
                text=text,
                dataset=dataset,
                seqlen=seqlen,
                n_windows=n_windows,
                device=where,
                dtype=dtype,
                runtime=runtime,
                progress=on_window,
            )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: PerplexityResult) -> None:
    protocol = result.protocol
    facts = [
        ("model", str(protocol["model"])),
        ("text", f"{protocol['text']} ({protocol['n_rows']:,} rows, joined with {protocol['rows_joined_with']!r})"),
        (
            "windows",
            f"{result.n_windows} of {protocol['n_windows_given']}, {result.seqlen} tokens each: {protocol['windows']}",
        ),
        ("predicted", f"{result.n_tokens:,} tokens: {protocol['predicted']}"),
        ("mean", f"{result.nll:.6f}, {protocol['mean']}"),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s, {format_seconds(result.seconds)}"),
        ("run on", f"{protocol['device']} in {protocol['dtype']}"),
        ("ppl", f"{result.ppl:.4f}"),
    ]
    print_facts(facts)
