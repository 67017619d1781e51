"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(path: str | Path) -> Path:
    """The path with the home folder in place of a leading ``~`` or ``~user``; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))
