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


def resolve_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that `name` lists: "cpu", "cuda", "cuda:1", "cuda:0,1" or "cuda:0,cuda:1".

    Raises
    ------
    UsageError : as `resolve_device`; or one of them twice, or more than one that are not all numbered CUDA devices.
    """
    parts = [part.strip() for part in name.split(",")]
    names = [f"cuda:{part}" if part.isdecimal() and len(parts) > 1 else part for part in parts]
    devices = tuple(resolve_device(part) for part in names)
    if len(devices) > 1 and (len(set(devices)) < len(devices) or any(device.index is None for device in devices)):
        raise UsageError(f"device {name!r} must list different CUDA devices by number, such as 'cuda:0,1'.")
    return devices


def cpu_name() -> str:
    """Of the processor, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
