"""The typer application: which commands there are. Each command is one module."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mendlm.cli import (
    bench,
    compress,
    evaluate,
    export,
    generate,
    import_gguf,
    inspect,
    plan,
    recipes,
    report,
    sweep,
    verify,
)
from mendlm.cli._options import TracebackOption
from mendlm.cli._threads import share_cores

_EXAMPLES = """[bold]Examples[/bold]

[green]mendlm compress SmolLM2-135M out --sparsity 0.5 --rank 5%[/green]

[green]mendlm plan SmolLM2-135M --target-bytes 0.6 -o budget.yaml[/green]

[green]mendlm eval out --text test.parquet --n-windows 8[/green]

[green]mendlm generate out "The capital of France is" --compare SmolLM2-135M[/green]

[green]mendlm inspect out[/green]

[bold]Exit codes[/bold]: 0 done, 1 the work failed, 2 wrong use, 130 interrupted."""


def _show_version(wanted: bool) -> None:
    if wanted:
        from mendlm import __version__

        typer.echo(f"mendlm {__version__}")
        raise typer.Exit


def build_command() -> Any:
    """The command-line parser with every command registered."""
    app = typer.Typer(
        name="mendlm",
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(epilog=_EXAMPLES)
    def root(
        context: typer.Context,
        version: Annotated[
            bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
        ] = False,
        traceback: TracebackOption = False,
    ) -> None:
        """Compress pretrained language models as sparse + low-rank, [bold]W ≈ S + B @ A[/bold], without retraining."""
        share_cores(context.invoked_subcommand)

    app.command("compress", epilog=compress.EXAMPLES)(compress.compress)
    app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
    app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
    app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
    app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
    app.command("bench", epilog=bench.EXAMPLES)(bench.bench)
    app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
    app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
    app.command("report", epilog=report.EXAMPLES)(report.report)
    app.command("export", epilog=export.EXAMPLES)(export.export)
    app.command("import", epilog=import_gguf.EXAMPLES)(import_gguf.import_gguf)
    app.command("recipes", epilog=recipes.EXAMPLES)(recipes.recipes)
    return typer.main.get_command(app)
