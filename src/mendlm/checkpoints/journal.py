"""The journal of a run: what has been written so far, so that a run that was stopped can be continued.

The first line is the run's fingerprint; then comes one line per finished tensor, appended after its data was written,
with a checksum of that data. Resuming trusts a line only if the checksum fits what is on the disk, so neither a line
that was cut off nor data that a power failure lost does harm: that tensor is simply done again. Every line ends with a
checksum of itself, as its record goes into the result unseen.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mendlm.checkpoints.writer import SYNC_SECONDS, open_new, storage_errors
from mendlm.errors import StorageError, UsageError

logger = logging.getLogger(__name__)

FORMAT = "mendlm-journal-2"
_ANY_FORMAT = "mendlm-journal-"


@dataclass(frozen=True)
class Entry:
    """A finished tensor: checksum of its stored bytes, its record (None if it was copied), and the time it took."""

    name: str
    crc32: int
    record: Mapping[str, Any] | None
    seconds: float


class Journal:
    """An open journal; use `create` or `reopen`, and close it."""

    def __init__(self, path: Path, fd: int, fingerprint: Mapping[str, Any], entries: Mapping[str, Entry]):
        self.path = path
        self.fingerprint = fingerprint
        self.entries = entries
        self._fd = fd
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any]) -> Self:
        """Start a journal, replacing one that is there.

        Raises
        ------
        StorageError : it cannot be written.
        """
        fd = open_new(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        journal = cls(path, fd, fingerprint, {})
        try:
            journal._append({"format": FORMAT, "fingerprint": fingerprint})
            journal.sync()
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopen(cls, path: Path) -> Self | None:
        """Continue a journal after its last whole line; None if there is none, or its first line is damaged.

        A damaged line costs the tensor that it was about, not those after it.

        Raises
        ------
        UsageError : another version of mendlm wrote it.
        StorageError : it cannot be read or written.
        """
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as err:
            raise StorageError(f"cannot read {str(path)!r}: {err.strerror or err}.") from err
        size = raw.rfind(b"\n") + 1
        first, *lines = raw[:size].split(b"\n")[:-1] or [b""]
        fingerprint = _parse_first(path, first)
        if fingerprint is None:
            return None
        parsed = [_parse_entry(line) for line in lines]
        entries = {entry.name: entry for entry in parsed if entry is not None}
        if n_damaged := parsed.count(None):
            logger.warning("%d lines of the journal are damaged: those tensors are done again", n_damaged)
        fd = open_new(path, os.O_WRONLY | os.O_APPEND)
        try:
            with storage_errors(path):
                os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, fingerprint, entries)

    def add(self, entry: Entry) -> None:
        """Append a finished tensor; it survives a killed process from now on.

        Raises
        ------
        StorageError : it cannot be written; the journal is as it was.
        """
        self._append(
            {"name": entry.name, "crc32": entry.crc32, "record": entry.record, "seconds": round(entry.seconds, 4)}
        )
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the journal is on the disk."""
        with storage_errors(self.path):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, row: Mapping[str, Any]) -> None:
        with storage_errors(self.path):
            data = memoryview(_encode(row))
            size = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError:
                os.ftruncate(self._fd, size)  # half a line would spoil the one that comes after it
                raise


def _encode(row: Mapping[str, Any]) -> bytes:
    """A line: a JSON object whose last member is the CRC-32 of what is before it."""
    text = json.dumps(row, separators=(",", ":")).encode()
    return b'%s,"line_crc32":%d}\n' % (text[:-1], zlib.crc32(text[:-1]))


def _decode(line: bytes) -> dict[str, Any] | None:
    """The row of a line without its end; None if it is damaged."""
    text, _, _ = line.rpartition(b',"line_crc32":')
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and row.pop("line_crc32", None) == zlib.crc32(text) else None


def _parse_first(path: Path, line: bytes) -> Mapping[str, Any] | None:
    """The fingerprint in the first line of a journal."""
    row = _decode(line)
    if row is not None and row.get("format") == FORMAT and isinstance(row.get("fingerprint"), dict):
        fingerprint: Mapping[str, Any] = row["fingerprint"]
        return fingerprint
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    other = parsed.get("format") if isinstance(parsed, dict) else None
    if isinstance(other, str) and other.startswith(_ANY_FORMAT) and other != FORMAT:
        raise UsageError(
            f"the run to resume in {str(path.parent)!r} was begun by another version of mendlm: its journal is "
            f"{other!r}, this mendlm writes {FORMAT!r}. Finish it with that version, or pass --overwrite to start anew."
        )
    return None


def _parse_entry(line: bytes) -> Entry | None:
    """The entry in a line of a journal; None if it is damaged."""
    row = _decode(line)
    try:
        return None if row is None else Entry(**row)
    except TypeError:
        return None
