"""Execution: where and in what order tensors are worked on. Every executor writes the same bytes.

A new executor is one file here and one line in `EXECUTORS`; the contract tests then cover it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mendlm.errors import UsageError
from mendlm.execution._base import AbstractExecutor as AbstractExecutor
from mendlm.execution._base import Pool as Pool
from mendlm.execution.local import LocalExecutor as LocalExecutor
from mendlm.execution.ray import RayExecutor as RayExecutor

EXECUTORS: dict[str, type[AbstractExecutor]] = {kind.name: kind for kind in (LocalExecutor, RayExecutor)}


def make_executor(name: str, **settings: Any) -> AbstractExecutor:
    """The executor called `name` with the settings that are not None.

    Raises
    ------
    UsageError : no such executor, or a setting that it does not have.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor {name!r}. Available: {', '.join(EXECUTORS)}.")
    kind: Any = EXECUTORS[name]
    given = {key: value for key, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(kind)}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f"{key} {value!r} does not go with the executor {name!r}. Leave it out.")
    executor: AbstractExecutor = kind(**given)
    return executor
