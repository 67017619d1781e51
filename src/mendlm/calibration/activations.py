"""The hidden states of all calibration windows between two blocks: one buffer, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor

from mendlm.checkpoints.writer import storage_errors
from mendlm.errors import UsageError


class Activations:
    """Hidden states (n_sequences, seqlen, hidden), read and replaced batch by batch.

    Parameters
    ----------
    n_sequences, seqlen, hidden : shape.
    dtype : of the entries.
    batch_size : windows in a batch; the last batch may be smaller.
    folder : where to keep them in a file; None keeps them in memory. The file has no name any more once it is open, so
        nothing stays behind however the process ends.

    Raises
    ------
    UsageError : `folder` is not a folder.
    StorageError : the file cannot be written, or its disk is full.
    """

    def __init__(
        self, n_sequences: int, seqlen: int, hidden: int, dtype: torch.dtype, batch_size: int, folder: Path | None
    ) -> None:
        shape = (n_sequences, seqlen, hidden)
        self._batch_size = batch_size
        self._data = torch.empty(shape, dtype=dtype) if folder is None else _in_file(folder, shape, dtype)

    @property
    def n_bytes(self) -> int:
        """Size of the buffer."""
        return self._data.nbytes

    @property
    def n_sequences(self) -> int:
        """Number of windows."""
        return self._data.shape[0]

    def select(self, rows: Tensor) -> Tensor:
        """Copies of the windows `rows` (n,) int64, (n, seqlen, hidden)."""
        return self._data[rows]

    def batches(self) -> Iterator[Tensor]:
        """Views of the buffer, (batch, seqlen, hidden); what is written into one stays."""
        yield from torch.split(self._data, self._batch_size)


def _in_file(folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    if not folder.is_dir():
        raise UsageError(f"--activation-dir {str(folder)!r} is not a folder. Make it, or choose another one.")
    n = shape[0] * shape[1] * shape[2]
    with storage_errors(folder):
        fd, name = mkstemp(prefix="mendlm-activations-", dir=folder)
        try:
            size = n * dtype.itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            os.ftruncate(fd, size)
            return torch.from_file(name, shared=True, size=n, dtype=dtype).reshape(shape)
        finally:
            os.close(fd)
            os.unlink(name)
