"""`mendlm verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mendlm.cli._console import (
    Column,
    format_bytes,
    format_seconds,
    json_only,
    print_facts,
    print_json,
    print_table,
)
from mendlm.cli._options import JsonOption, TracebackOption
from mendlm.cli._progress import progress_view
from mendlm.errors import CheckpointError

if TYPE_CHECKING:
    from mendlm.verifying import Verification

EXAMPLES = """[bold]Examples[/bold]

[dim]Is the folder what compress wrote? Hashes, headers, bitmasks, patterns, finite values:[/dim]

[green]mendlm verify out[/green]

[dim]And are its stated errors true, and the copied tensors those of the original?[/dim]

[green]mendlm verify out --original SmolLM2-135M[/green]

[dim]Everything that is wrong, for a program; the exit code is 1 if anything is:[/dim]

[green]mendlm verify out --json | jq '.findings[]'[/green]"""

_COLUMNS = (Column("check", is_number=False), Column("place", is_number=False), Column("problem", is_number=False))


def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that compress wrote.", show_default=False)],
    original: Annotated[
        str | None,
        typer.Option(
            "--original",
            metavar="MODEL",
            help="The dense model: also check the stated errors, the input hashes and the copied tensors.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Check a compressed folder for damage: files, headers, records, every tensor. Exit code 1 if anything is wrong."""
    with json_only(as_json) as stream:
        from mendlm.verifying import verify as run_verify

        with progress_view(stream, "verify") as view:

            def on_progress(done: int, total: int, place: str) -> None:
                view.started(place, done, total)
                if stream.isatty():  # in a pipe a line for every tensor says nothing
                    view.advanced(done, total, place)

            found = run_verify(out, original, progress=on_progress)
    if as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    if _is_of_another(found):
        raise CheckpointError(
            f"{str(original)!r} is not the model that {str(found.path)!r} was made from; nothing else is wrong with "
            "it. Give the right --original."
        )
    if not found.ok:
        n = len(found.findings)
        raise CheckpointError(
            f"{str(found.path)!r} is damaged: {n} finding{'s' if n > 1 else ''}, first in "
            f"{found.findings[0].place!r}. Compress the model again, or fetch the folder again."
        )


def _is_of_another(found: Verification) -> bool:
    """Whether nothing is wrong but that the original is another model."""
    return bool(found.findings) and all(finding.check == "input" for finding in found.findings)


def _show(found: Verification) -> None:
    if found.findings:
        print_table(_COLUMNS, [[f.check, f.place, f.problem] for f in found.findings])
    checked = ", ".join(f"{check} {n}" for check, n in found.checked.items())
    facts = [
        ("folder", str(found.path)),
        ("weights", f"{found.n_tensors} tensors, {format_bytes(found.n_bytes)}"),
        ("checked", checked),
    ]
    facts += [("not checked", sentence) for sentence in found.skipped]
    if found.manifest_sha256 is not None:
        facts.append(("mendlm.json", f"SHA-256 {found.manifest_sha256}"))
    facts.append(("time", format_seconds(found.seconds)))
    damaged = "of another original" if _is_of_another(found) else f"damaged, {len(found.findings)} findings"
    facts.append(("result", "sound" if found.ok else damaged))
    print_facts(facts)
