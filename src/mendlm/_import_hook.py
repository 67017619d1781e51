"""Registers mendlm with transformers as soon as transformers is imported, without importing it.

transformers finds quantization methods in a table, not by entry points, so something has to fill it in. Importing
transformers for that would make `import mendlm` take seconds; a finder waits for the one module instead.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

_TABLE = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' table is loaded, else when it will be. Calling it again does nothing."""
    if not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())
    if _TABLE in sys.modules:
        _register()


def _register() -> None:
    # While mendlm.hf itself is being imported it has no `register` yet, and registers at its end.
    register = getattr(importlib.import_module("mendlm.hf"), "register", None)
    if register is not None:
        register()


class _Waiter(importlib.abc.MetaPathFinder):
    """Stays for good, at the cost of comparing one string per import: a reload makes a new, empty table."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TABLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # The module keeps its own loader, for inspect and for reload.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
