"""`mendlm recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mendlm.cli._console import Column, json_only, print_json, print_table
from mendlm.cli._options import JsonOption, TracebackOption

EXAMPLES = """[bold]Examples[/bold]

[green]mendlm recipes[/green]

[dim]One of them as a file, to start from:[/dim]

[green]mendlm recipes wanda-tlr-50 > mine.yaml[/green]

[green]mendlm compress SmolLM2-135M out --recipe mine.yaml[/green]"""


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one, as its file has it.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """List the built-in recipes, one per published setting, or print one."""
    with json_only(as_json):
        from mendlm.names import lookup
        from mendlm.recipe_files import builtin_recipes, load_recipe, recipe_headline

        table = builtin_recipes()
        if name is not None:
            table = {name: lookup(table, name, "recipe")}
        resolved = {key: load_recipe(path).to_dict() for key, path in table.items()} if as_json else {}
    if as_json:
        print_json(resolved)
    elif name is not None:
        typer.echo(table[name].read_text(encoding="utf-8"), nl=False)
    else:
        columns = [Column("recipe", False), Column("what it is", False)]
        print_table(columns, [[key, recipe_headline(path)] for key, path in table.items()])
