"""`mendlm generate`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mendlm.cli._console import console_for, format_float, json_only, print_json, safe, safe_text
from mendlm.cli._options import ComputeDtypeOption, DeviceOption, JsonOption, RuntimeOption, TracebackOption
from mendlm.errors import UsageError

if TYPE_CHECKING:
    from mendlm.generation import Generation

OnText = Callable[[int, str], None]

EXAMPLES = """[bold]Examples[/bold]

[dim]What a compressed folder makes of a prompt:[/dim]

[green]mendlm generate out "The capital of France is"[/green]

[dim]Beside its original, as a chat, the prompt from a file:[/dim]

[green]mendlm generate out --compare SmolLM2-135M --chat - < question.txt[/green]

[dim]Drawn, not greedy; for a script:[/dim]

[green]mendlm generate out "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 1 --json | jq -r .text[/green]"""


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, dense or compressed.", show_default=False)],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to go on from; - reads stdin.", show_default=False)
    ],
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="OTHER", help="A second folder, shown beside the first.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, metavar="T", help="0 is greedy: the likeliest token every time.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="P", help="Draw from the likeliest tokens of this probability together."),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt into the tokenizer's chat template.")
    ] = False,
    device: DeviceOption = None,
    dtype: ComputeDtypeOption = None,
    runtime: RuntimeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Let a model go on from a prompt, and show the text as it comes; with --compare, two models side by side."""
    text = _read_stdin() if prompt == "-" else prompt
    models = [model] if compare is None else [model, compare]
    with json_only(as_json):
        from mendlm.generation import generate_each

        with _view(models, wanted=not as_json) as on_text:
            results = generate_each(
                models,
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                chat=chat,
                device=device,
                dtype=dtype,
                runtime=runtime,
                on_text=on_text,
            )
    if as_json:
        documents = [result.to_dict() for result in results]
        print_json(documents[0] if compare is None else documents)
    else:
        _show_facts(results)


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as err:
        raise UsageError("stdin is not UTF-8 text. Convert it first, e.g. with iconv -t utf-8.") from err


@contextlib.contextmanager
def _view(models: Sequence[str], *, wanted: bool) -> Iterator[OnText | None]:
    """What shows the texts on stdout as they come."""
    if not wanted:
        yield None
    elif len(models) == 1:
        with _stream([]) as on_text:
            yield on_text
    elif not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        with _stream(models) as on_text:
            yield on_text
    else:
        with _columns(models) as on_text:
            yield on_text


@contextlib.contextmanager
def _stream(headings: Sequence[str]) -> Iterator[OnText]:
    """Texts one after the other, with headings if there are any."""
    begun = 0

    def begin(index: int) -> None:
        nonlocal begun
        while begun <= min(index, len(headings) - 1):
            sys.stdout.write(("\n\n" if begun else "") + f"== {safe(headings[begun])} ==\n")
            begun += 1

    def on_text(index: int, piece: str) -> None:
        begin(index)
        sys.stdout.write(safe_text(piece))
        sys.stdout.flush()

    yield on_text
    begin(len(headings))  # a text may have been empty
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _columns(models: Sequence[str]) -> Iterator[OnText]:
    """Texts side by side on a terminal, drawn again as they grow."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = ["" for _ in models]

    def draw() -> Any:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        for name in models:
            table.add_column(Text(safe(name), style="bold"), ratio=1, overflow="fold")
        table.add_row(*(Text(safe_text(text)) for text in texts))
        return table

    with Live(console=console_for(sys.stdout), get_renderable=draw, refresh_per_second=8) as live:

        def on_text(index: int, piece: str) -> None:
            texts[index] += piece

        yield on_text
        live.vertical_overflow = "visible"  # all of it, at the end


def _show_facts(results: Sequence[Generation]) -> None:
    """What is not the text goes to stderr, so that `> FILE` keeps the text alone."""
    why = {"end": "ended by the model", "length": "cut at --max-new-tokens", "positions": "cut: no positions left"}
    console = console_for(sys.stderr)
    for result in results:
        name = f"{safe(result.model)}: " if len(results) > 1 else ""
        decode = result.decode_tokens_per_second
        speed = f"prefill {format_float(result.prefill_tokens_per_second, 3)} tokens/s" + (
            "" if decode is None else f", decode {format_float(decode, 3)} tokens/s"
        )
        line = f"{name}{result.n_prompt_tokens} + {result.n_new_tokens} tokens, {why[result.stopped]}; {speed}"
        console.print(line, style="dim", soft_wrap=True)
