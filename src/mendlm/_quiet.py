"""transformers without its progress bars and log lines, for a while."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines below errors from transformers; everything is put back afterwards."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    tqdm = getattr(legacy, "tqdm", None)  # this module's bar does not listen to transformers' switch
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if tqdm is not None:
        legacy.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        if tqdm is not None:
            legacy.tqdm = tqdm
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
