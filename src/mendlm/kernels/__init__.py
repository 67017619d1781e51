"""Kernels that multiply with packed weights without unpacking them: `packed` holds the operators, CPU in C."""

from __future__ import annotations
