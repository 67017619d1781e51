"""Paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mendlm.errors import UsageError

_FILE_URL = re.compile(r"(?:file|local):(?://|(?=/))")  # a Path has one of the slashes only


def is_file_url(path: str | Path) -> bool:
    """Whether a path of this machine is written as a URL: ``file:///models/m``."""
    return _FILE_URL.match(str(path)) is not None


def local_path(path: str | Path) -> Path:
    """The path with the home folder in place of a leading ``~`` or ``~user``; unchanged if there is no such user.

    Of a ``file://`` URL the path in it.

    Raises
    ------
    UsageError : it is empty, which would mean the current folder.
    """
    if not str(path):
        raise UsageError("a path is empty. Give '.' for the current folder.")
    return Path(os.path.expanduser(_FILE_URL.sub("", str(path), count=1)))


def check_parent(path: Path, what: str) -> None:
    """Refuse a file to write, called `what` in the sentence, in a folder that does not exist.

    Raises
    ------
    UsageError : there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{what} is in a folder that does not exist.")
