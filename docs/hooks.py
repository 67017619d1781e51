"""What the build of the site adds to the pages: reference pages made from the code, and formulas as MathML.

mkdocs calls the functions `on_…`; mkdocstrings loads `NumpyToMarkdown`. Nothing here is part of the package.
"""

from __future__ import annotations

import html
import inspect
import re
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from rich.text import Text

import mendlm
from mendlm.cli._app import build_command

EXTENDING = ("mendlm.refiners.AbstractRefiner", "mendlm.refiners.Problem", "mendlm.refiners.Progress")
SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Attributes|Notes|References|Examples)\n-+\n", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    for path, text in (("reference/cli.md", cli_reference()), ("reference/python.md", python_reference())):
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script, and escaped bars in tables as bars."""
    text = re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), text, flags=re.DOTALL)
    text = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda found: _mathml(found[1], "inline"),
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>',
        text,
        flags=re.DOTALL,
    )


def _mathml(tex: str, display: str) -> str:
    """TeX as MathML; bars of norms keep their size, also before a subscript."""
    math = convert(html.unescape(tex).strip(), display=display)
    return math.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def cli_reference() -> str:
    """Every command with its usage, its flags and its examples, as `--help` has them."""
    commands = build_command().commands
    parts = [
        "# Commands and flags",
        "Made from the program itself: what `--help` says. What the commands print, their JSON and their exit codes:"
        " [Command line](../cli.md).",
    ]
    for name, command in commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = " ".join(["mendlm", name, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])])
        parts += [f"## {name}", f"```\n{usage}\n```", _plain(command.help)]
        parts.append("\n".join(["| | default | meaning |", "| --- | --- | --- |", *map(_row, arguments + options)]))
        parts.append(_examples(command.epilog or ""))
    return "\n\n".join(parts) + "\n"


def python_reference() -> str:
    """One entry for every public name, in groups by what it is."""
    refiners, functions, classes = [], [], []
    for name in sorted(mendlm.__all__, key=str.lower):
        found = getattr(mendlm, name)
        if not inspect.isclass(found):
            functions.append(f"mendlm.{name}")
        elif found.__module__.startswith("mendlm.refiners.") and name != "Refinement":
            refiners.append(f"mendlm.{name}")
        else:
            classes.append(f"mendlm.{name}")
    groups = {"Functions": functions, "Refiners": refiners, "Settings and results": classes, "Extending": EXTENDING}
    parts = [
        "# Python",
        "Made from the docstrings. `import mendlm` is enough for every name but those under *Extending*.",
    ]
    for title, names in groups.items():
        # The methods of a refiner are for the loop that calls them: once, at AbstractRefiner.
        options = "\n    options:\n      members: false" if title == "Refiners" else ""
        parts += [f"## {title}", *(f"::: {name}{options}" for name in names)]
    return "\n\n".join(parts) + "\n"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        flags, default = _argument(parameter).strip("[]"), "required" if parameter.required else ""
    else:
        flags = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if not parameter.is_flag:
            flags += f" {parameter.metavar or parameter.type.name.upper()}"
        shown = isinstance(parameter.default, str | int | float) and not isinstance(parameter.default, bool)
        default = str(parameter.default) if shown and parameter.show_default is True else ""
    text, stated, value = _plain(parameter.help).rpartition("Default: ")
    if stated:
        default = value.removesuffix(".")
    else:
        text = value
    return f"| `{_cell(flags)}` | {_cell(default)} | {_cell(text.strip())} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(markup: str | None) -> str:
    """Text of rich markup, with what Markdown would read as formatting escaped."""
    return re.sub(r"([*_<>\[\]])", r"\\\1", Text.from_markup(inspect.cleandoc(markup or "")).plain)


def _examples(epilog: str) -> str:
    """The paragraphs of an epilog: commands (green) in blocks, the rest as text."""
    parts = []
    for paragraph in inspect.cleandoc(epilog).split("\n\n"):
        command = paragraph.startswith("[green]") and paragraph.endswith("[/green]")
        parts.append(f"```\n{Text.from_markup(paragraph).plain}\n```" if command else _plain(paragraph))
    return "\n\n".join(parts)


class NumpyToMarkdown(griffe.Extension):
    """Docstrings as Markdown: their parameters are described after the colon, where numpydoc has the type."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring is not None:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(docstring: str) -> str:
    """A docstring in the form of this project as Markdown: sections in bold, their entries as lists."""
    first, *rest = SECTION.split(inspect.cleandoc(docstring))
    parts = [_code(first)]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        if title in ("Parameters", "Attributes", "Raises", "Returns", "Yields"):
            body = re.sub(r"^([\w.*, ]+?) : ", lambda found: f"\n- `{found[1]}`: ", body, flags=re.MULTILINE)
        else:
            body = re.sub(r"^\.\. \[(\d+)\] ", r"\n\\[\1] ", body, flags=re.MULTILINE)
        parts.append(f"**{title}**\n\n{_code(body).strip()}")
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return text.replace("``", "`")
