"""The command line: parse, build a recipe, call the library, print. Nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : arguments without the program's name; `sys.argv` if not given.

    Returns
    -------
    The exit code: 0 done, 1 the work failed, 2 wrong use, 130 interrupted.
    """
    from mendlm.cli._app import build_command
    from mendlm.cli._errors import Session, run

    return run(build_command(), list(sys.argv[1:] if argv is None else argv), Session())
