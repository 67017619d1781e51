"""Look-up of named things (criteria, refiners, runtimes) with a helpful error."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Mapping
from typing import TypeVar

from mendlm.errors import UsageError

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``; an unknown name raises `UsageError` with the nearest known one and the whole list."""
    try:
        return table[name]
    except KeyError:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(sorted(table))
        raise UsageError(f"unknown {kind} {name!r}.{hint} Available: {known}.") from None


def literal_name(match: str) -> str | None:
    """The one name that a glob made by `glob.escape` matches; None for other globs."""
    name = re.sub(r"\[([*?[])\]", r"\1", match)
    return name if glob.escape(name) == match else None
