"""Reports: records of what was done, and what is made of them.

The package can be called: ``mendlm.report("out", "report.html")`` is `mendlm.report.report`, whichever of the package
and the function of the same name Python has put under ``mendlm.report``. Parameters, result and errors are that
function's: ``help(mendlm.report.report)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mendlm._lazy import resolve as _resolve

_LAZY = {"ReportResult": "mendlm.report._report", "report": "mendlm.report._report"}

if TYPE_CHECKING:
    from mendlm.report._report import ReportResult as ReportResult
    from mendlm.report._report import report as report


def __getattr__(name: str) -> Any:
    return _resolve(_LAZY, __name__, name)


class _Callable(ModuleType):
    """A module that calls its function `report`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from mendlm.report._report import report as run

        return run(*args, **options)


sys.modules[__name__].__class__ = _Callable
