"""Writing: one output shard whose whole layout is known before the first tensor is ready.

The population of every mask is exact and known, so the header is written first, the file gets its full size on disk at
once, and a tensor goes to its place whenever it is ready. A full disk thus shows before any work is done.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from mendlm.checkpoints.header import FLOATING, encode_header
from mendlm.checkpoints.reader import CHUNK_BYTES, read_errors
from mendlm.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` about writing `path` into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as err:
        if err.errno in _FULL:
            raise StorageError(
                f"no space left for {str(path)!r} ({err.strerror}). Free some space, or write to another disk."
            ) from err
        raise StorageError(f"cannot write {str(path)!r}: {err.strerror or err}.") from err


class ShardLayout:
    """What an output shard will look like.

    Parameters
    ----------
    name : file name.
    tensors : (name, dtype, shape) of every stored tensor.
    metadata : strings of the input's ``__metadata__``.
    """

    def __init__(self, name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]):
        self.name = name
        self.header, infos = encode_header(tensors, metadata)
        self.infos = {info.name: info for info in infos}
        self.data_bytes = infos[-1].end if infos else 0

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.data_bytes


class ShardWriter:
    """An output shard on disk; use as a context manager.

    Parameters
    ----------
    folder : where the file goes.
    layout : what it will hold.
    """

    def __init__(self, folder: Path, layout: ShardLayout):
        self.path = folder / layout.name
        self.layout = layout
        self._fd = -1

    def __enter__(self) -> Self:
        with storage_errors(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._fd)

    def allocate(self) -> bool:
        """Give the file its full size and its header; whether both were there already (a run that is resumed).

        Raises
        ------
        StorageError : the disk is full, or cannot be written.
        """
        size, header = self.layout.size_bytes, self.layout.header
        with storage_errors(self.path):
            if os.fstat(self._fd).st_size == size and os.pread(self._fd, len(header), 0) == header:
                return True
            os.ftruncate(self._fd, 0)
            _preallocate(self._fd, size)
            _write_all(self._fd, memoryview(header), 0)
        return False

    def write(self, name: str, chunks: Iterable[memoryview], crc32: int = 0) -> int:
        """Write the bytes of the tensor `name`, in order; the checksum `crc32` continued over them.

        Raises
        ------
        StorageError : the disk is full, or cannot be written.
        """
        info = self.layout.infos[name]
        offset = len(self.layout.header) + info.start
        end = offset + info.n_bytes
        with storage_errors(self.path):
            for chunk in chunks:
                if offset + len(chunk) > end:
                    raise StorageError(f"{name!r} has more than the {info.n_bytes} bytes planned for it.")
                _write_all(self._fd, chunk, offset)
                offset += len(chunk)
                crc32 = zlib.crc32(chunk, crc32)
        if offset != end:
            raise StorageError(f"{name!r} has {end - offset} bytes fewer than the {info.n_bytes} planned for it.")
        return crc32

    def checksum(self, names: Iterable[str]) -> int:
        """CRC-32 of the bytes on disk of the tensors `names`, one after the other."""
        crc32 = 0
        with storage_errors(self.path):
            for name in names:
                info = self.layout.infos[name]
                first = len(self.layout.header)
                for start in range(info.start, info.end, CHUNK_BYTES):
                    n = min(CHUNK_BYTES, info.end - start)
                    crc32 = zlib.crc32(os.pread(self._fd, n, first + start), crc32)
        return crc32

    def read(self, name: str) -> Tensor:
        """The tensor `name` as it is on the disk, in fresh memory on the CPU."""
        info = self.layout.infos[name]
        dtype = torch.uint8 if info.dtype == "U8" else FLOATING[info.dtype]
        raw = bytearray()
        first = len(self.layout.header)
        with storage_errors(self.path):
            for start in range(info.start, info.end, CHUNK_BYTES):
                raw += os.pread(self._fd, min(CHUNK_BYTES, info.end - start), first + start)
        return torch.frombuffer(raw, dtype=dtype).reshape(info.shape) if raw else torch.empty(info.shape, dtype=dtype)

    def sync(self) -> None:
        """Wait until the data is on the disk."""
        with storage_errors(self.path):
            os.fsync(self._fd)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on the disk.

    Raises
    ------
    StorageError : the disk is full, or cannot be written.
    """
    with storage_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content (its mode follows the umask) and wait until it is on the disk.

    Raises
    ------
    CheckpointError : `source` cannot be opened.
    StorageError : the disk is full, or `target` cannot be written.
    """
    with read_errors(source):
        old = source.open("rb")
    with old, storage_errors(target), target.open("wb") as new:
        while chunk := old.read(CHUNK_BYTES):
            new.write(chunk)
        new.flush()
        os.fsync(new.fileno())


def _preallocate(fd: int, size: int) -> None:
    """Reserve disk blocks; where the system cannot, only set the size."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as err:
            if err.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(fd, size)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n
