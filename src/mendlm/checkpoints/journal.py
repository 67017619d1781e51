"""The journal of a run: what has been written so far, so that a run that was stopped can be continued.

The first line is the run's fingerprint; then comes one line per finished tensor, appended after its data was written,
with a checksum of that data. Resuming trusts a line only if the checksum fits what is on the disk, so neither a line
that was cut off nor data that a power failure lost does harm: that tensor is simply done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mendlm.checkpoints.writer import storage_errors

FORMAT = "mendlm-journal-1"


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

    @classmethod
    def create(cls, path: Path, fingerprint: Mapping[str, Any]) -> Self:
        """Start a journal, replacing one that is there.

        Raises
        ------
        StorageError : it cannot be written.
        """
        with storage_errors(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        journal = cls(path, fd, fingerprint, {})
        journal._append({"format": FORMAT, "fingerprint": fingerprint})
        journal.sync()
        return journal

    @classmethod
    def reopen(cls, path: Path) -> Self | None:
        """Continue a journal after its last whole line; None if there is none, or not even its first line is whole."""
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        fingerprint: Mapping[str, Any] | None = None
        entries: dict[str, Entry] = {}
        size = 0
        for line in raw.splitlines(keepends=True):
            row = _parse(line)
            if row is None:
                break
            if fingerprint is None:
                fingerprint = row.get("fingerprint") if row.get("format") == FORMAT else None
                if fingerprint is None:
                    return None
            else:
                try:
                    entry = Entry(**row)
                except TypeError:
                    break
                entries[entry.name] = entry
            size += len(line)
        if fingerprint is None:
            return None
        with storage_errors(path):
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.ftruncate(fd, size)
        return cls(path, fd, fingerprint, entries)

    def add(self, entry: Entry) -> None:
        """Append a finished tensor; it survives a killed process from now on."""
        self._append(
            {"name": entry.name, "crc32": entry.crc32, "record": entry.record, "seconds": round(entry.seconds, 4)}
        )

    def sync(self) -> None:
        """Wait until the journal is on the disk."""
        with storage_errors(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, row: Mapping[str, Any]) -> None:
        with storage_errors(self.path):
            data = memoryview(json.dumps(row, separators=(",", ":")).encode() + b"\n")
            while data:
                data = data[os.write(self._fd, data) :]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a whole line, None for anything else."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
