"""Giving memory back to the system: freed is not returned by itself."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Return the free pages of the C heap to the system, where its library can (glibc).

    glibc keeps freed blocks of up to 32 MB, and a run that loads one block of a model after the other finds them in
    pieces that do not fit: after 30 blocks of SmolLM2-135M it held twice what it used. Takes milliseconds.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        function: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return lambda pad: None
    return function
