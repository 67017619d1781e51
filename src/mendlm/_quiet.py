"""transformers without its progress bars and log lines, for a while."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack

_lock = threading.Lock()
_depth = 0
_undo = ExitStack()  # what the first to come has changed, for the last to go


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines below errors from transformers; everything is put back afterwards.

    The switches are those of the process: of several at a time, in threads or nested, the last one puts them back.
    """
    global _depth
    with _lock:
        if not _depth:
            _silence()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                _undo.close()


def _silence() -> None:
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    if logging.is_progress_bar_enabled():
        _undo.callback(logging.enable_progress_bar)
    _undo.callback(logging.set_verbosity, logging.get_verbosity())
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tqdm = getattr(legacy, "tqdm", None)  # this module's bar does not listen to transformers' switch
    if tqdm is not None:
        _undo.callback(setattr, legacy, "tqdm", tqdm)
        legacy.tqdm = functools.partial(tqdm, disable=True)
