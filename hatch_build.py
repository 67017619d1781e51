"""Build hook: compile the CPU kernel into the package. Without a working C compiler, mendlm computes with torch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "src/mendlm/kernels/packed.c"
LIBRARY = "src/mendlm/kernels/_packed.so"
# No -march: the file chooses its instructions when it runs. No libgomp: torch brings the one to use.
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden"]


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled kernel to a wheel, editable or not, and marks the wheel as of this platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; on failure say so and leave a pure wheel."""
        if self.target_name != "wheel":
            return
        library = Path(self.root, LIBRARY)
        failure = compile_library(Path(self.root, SOURCE), library)
        if failure:
            library.unlink(missing_ok=True)
            self.app.display_warning(f"mendlm: no CPU kernel, torch will do its work: {failure}")
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"

    def clean(self, versions: list[str]) -> None:
        """Remove what was compiled."""
        Path(self.root, LIBRARY).unlink(missing_ok=True)


def compile_library(source: Path, library: Path) -> str | None:
    """Compile with $CC or cc; the reason why that failed, or None."""
    command = [*shlex.split(os.environ.get("CC") or "cc"), *FLAGS]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    # A running process may have the library open: put the new one in its place, never write into it.
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    try:
        subprocess.run([*command, str(source), "-o", str(partial)], check=True, capture_output=True, text=True)
        partial.replace(library)
    except OSError as err:
        return str(err)
    except subprocess.CalledProcessError as err:
        return (err.stderr or str(err)).strip()
    finally:
        partial.unlink(missing_ok=True)
    return None


def _platform_tag() -> str:
    from packaging.tags import platform_tags

    return next(iter(platform_tags()))
