"""Writing: one output shard whose whole layout is known before the first tensor is ready.

The population of every mask is exact and known, so the header is written first, the file gets its full size on disk at
once, and a tensor goes to its place whenever it is ready. A full disk thus shows before any work is done.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
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

SYNC_SECONDS = 30.0  # a power failure costs the work of this time, and what is in flight

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
        if err.errno == errno.ELOOP:
            raise StorageError(f"{str(path)!r} is a link, which is not followed. Remove it.") from err
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
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        self._fd = open_new(self.path, os.O_RDWR | os.O_CREAT)
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
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        if offset != end:
            raise StorageError(f"{name!r} has {end - offset} bytes fewer than the {info.n_bytes} planned for it.")
        return crc32

    def checksum(self, names: Iterable[str]) -> int:
        """CRC-32 of the bytes on disk of the tensors `names`, one after the other.

        Raises
        ------
        StorageError : they cannot be read.
        """
        crc32 = 0
        for name in names:
            for piece in self._pieces(name):
                crc32 = zlib.crc32(piece, crc32)
        return crc32

    def read(self, name: str) -> Tensor:
        """The tensor `name` as it is on the disk, in fresh memory on the CPU.

        Raises
        ------
        StorageError : it cannot be read.
        """
        info = self.layout.infos[name]
        dtype = torch.uint8 if info.dtype == "U8" else FLOATING[info.dtype]
        raw = bytearray()
        for piece in self._pieces(name):
            raw += piece
        return torch.frombuffer(raw, dtype=dtype).reshape(info.shape) if raw else torch.empty(info.shape, dtype=dtype)

    def sync(self) -> None:
        """Wait until the data is on the disk."""
        with storage_errors(self.path):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The bytes on disk of a tensor."""
        info = self.layout.infos[name]
        start, end = (len(self.layout.header) + at for at in (info.start, info.end))
        while start < end:
            try:
                piece = os.pread(self._fd, min(CHUNK_BYTES, end - start), start)
            except OSError as err:
                raise StorageError(f"cannot read back {str(self.path)!r}: {err.strerror or err}.") from err
            if not piece:
                raise StorageError(f"{str(self.path)!r} became shorter while a run was at work on it.")
            yield piece
            start += len(piece)


def open_new(path: Path, flags: int) -> int:
    """A descriptor of a file to write, whose mode follows the umask; a link in its place is not followed.

    Raises
    ------
    StorageError : it cannot be opened.
    """
    with storage_errors(path):
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file and wait until it is on the disk.

    Raises
    ------
    StorageError : the disk is full, or cannot be written.
    """
    _write_new(path, [memoryview(content)])


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file beside `path` and give it that name when it is on the disk: what was there stays till then.

    Raises
    ------
    StorageError : the disk is full, or cannot be written; `path` is as it was.
    """
    place = path.resolve()  # of what a link names
    new = place.with_name(f".{place.name}.{os.getpid()}")  # as `is_remnant`; another process may write the same file
    try:
        write_file(new, content)
        with storage_errors(path):
            new.replace(place)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def is_remnant(name: str, of: str) -> bool:
    """Whether a file is what `replace_file` leaves beside one named `of` when the process is killed meanwhile."""
    return re.fullmatch(rf"\.{re.escape(of)}\.\d+", name) is not None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content (its mode follows the umask) and wait until it is on the disk.

    Raises
    ------
    CheckpointError : `source` cannot be read.
    StorageError : the disk is full, or `target` cannot be written.
    """
    _write_new(target, _file_chunks(source))


def _file_chunks(path: Path) -> Iterator[memoryview]:
    with read_errors(path), path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield memoryview(chunk)


def _write_new(path: Path, chunks: Iterable[memoryview]) -> None:
    """Write a file from its beginning, and wait until it is on the disk."""
    pieces = iter(chunks)
    first = next(pieces, memoryview(b""))  # before the file is made: nothing of a source that cannot be read
    fd = open_new(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with storage_errors(path):
            offset = 0
            for piece in itertools.chain([first], pieces):
                _write_all(fd, piece, offset)
                offset += len(piece)
            os.fsync(fd)
    finally:
        os.close(fd)


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
