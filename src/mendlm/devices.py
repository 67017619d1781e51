"""Names of devices and dtypes, checked before any work."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from mendlm.errors import UsageError

# The dtypes that models are stored and computed in, by the names that users give.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device that `name` means: "cpu", "cuda" or "cuda:N".

    Raises
    ------
    UsageError : no such device, or torch finds none here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise UsageError(f"unknown device {name!r}. Use 'cpu', 'cuda' or 'cuda:N'.") from err
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported. Use 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda":
        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_devices:
            raise UsageError(
                f"device {name!r} is not available: torch {torch.__version__} finds {n_devices} CUDA devices. "
                "Use 'cpu', or install a CUDA build of torch."
            )
    return device


def cpu_name() -> str:
    """Of the processor, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
