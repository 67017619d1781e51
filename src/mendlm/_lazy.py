"""Lazy public names: `import mendlm` loads torch only; pydantic, transformers and the rest come when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def resolve(table: Mapping[str, str], package: str, name: str) -> Any:
    """Import the attribute `name` of `package` from the module that `table` names for it."""
    try:
        module = table[name]
    except KeyError:
        raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), name)
