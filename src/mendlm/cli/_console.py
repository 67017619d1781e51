"""Printing: consoles that never interpret names from files, tables for terminals and pipes, JSON."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


def safe(text: object) -> str:
    r"""`text` on one line without control characters: those, line breaks and direction marks become ``\x1b`` and so on.

    Names of tensors and paths come from files of others; written raw they could move the cursor or recolour a terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def safe_text(text: str) -> str:
    """`text` without control characters as in `safe`, but with its lines, tabs and spaces of any kind.

    The joiners that Persian and Indic scripts and emoji are written with stay too.
    """
    return "".join(c if c in _HARMLESS or unicodedata.category(c) == "Zs" else safe(c) for c in text)


_HARMLESS = "\n\t\u200c\u200d"


def console_for(stream: TextIO) -> Console:
    """A console on `stream`: no markup, no highlighting, and ANSI codes only if it is a terminal."""
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=is_terminal,
        color_system="auto" if is_terminal else None,
        markup=False,
        emoji=False,
        highlight=False,
    )


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[TextIO]:
    """Keep stdout for the JSON document: while the work runs, whatever prints goes to stderr.

    Yields the stream for progress: stderr if JSON is `wanted`, else stdout.
    """
    if not wanted:
        yield sys.stdout
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield sys.stderr


def print_json(document: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write `document` to stdout; NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True)
class Column:
    """One column of a table; numbers are aligned right, names left."""

    title: str
    is_number: bool = True


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, title: str = "", footer: Sequence[str] | None = None
) -> None:
    """Print a table on stdout: drawn on a terminal, aligned plain text in a pipe. Cells are shown as they are."""
    cells = [[safe(cell) for cell in row] for row in rows]
    last = None if footer is None else [safe(cell) for cell in footer]
    if sys.stdout.isatty():
        console_for(sys.stdout).print(_drawn(columns, cells, title, last))
        return
    lines = [[column.title for column in columns], *cells, *([last] if last else [])]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    if title:
        sys.stdout.write(f"{safe(title)}\n")
    for line in lines:
        padded = (_pad(cell, w, c.is_number) for cell, w, c in zip(line, widths, columns, strict=True))
        sys.stdout.write("  ".join(padded).rstrip() + "\n")
    sys.stdout.flush()


def _drawn(columns: Sequence[Column], rows: list[list[str]], title: str, footer: list[str] | None) -> Table:
    table = Table(
        title=Text(safe(title)) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_footer=footer is not None,
    )
    for i, column in enumerate(columns):
        table.add_column(
            Text(column.title),
            footer=Text(footer[i], style="bold") if footer else "",
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _pad(cell: str, width: int, is_number: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if is_number else cell + space


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print (label, value) pairs on stdout, one a line, values aligned."""
    width = max(cell_len(label) for label, _ in facts)
    console = console_for(sys.stdout)
    for label, value in facts:
        line = Text(f"{label}{' ' * (width - cell_len(label))}  ", style="dim")
        line.append(safe(value), style="not dim")
        console.print(line, soft_wrap=True)


def format_bytes(n: int | None) -> str:
    """`n` bytes for people, decimal units: 1_234_567 is "1.23 MB"; None is blank."""
    if n is None:
        return ""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{n} B" if unit == "B" else f"{_digits(value, 3)} {unit}"


def format_float(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits; None is blank."""
    return "" if value is None else _digits(value, digits)


def _digits(value: float, digits: int) -> str:
    """`value` with its trailing zeros, so that columns line up: 0.24 is "0.2400"."""
    return f"{value:#.{digits}g}".removesuffix(".")


def format_percent(value: float | None) -> str:
    """0.5 as "50.0 %"; None is blank."""
    return "" if value is None else f"{100 * value:.1f} %"


def format_seconds(seconds: float) -> str:
    """A duration for people: "0.40 s", "12 s", "3:05", "1:02:03"."""
    if seconds < 60:
        return f"{_digits(seconds, 2)} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_shape(shape: Sequence[int]) -> str:
    """(4096, 11008) as "4096×11008"; a scalar's () as "scalar"."""
    return "×".join(map(str, shape)) if len(shape) else "scalar"
