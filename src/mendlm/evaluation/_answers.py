"""Answers of a language model that are kept, so that an evaluation that was interrupted can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mendlm.checkpoints.finish import hash_files
from mendlm.errors import CheckpointError, StorageError, UsageError
from mendlm.paths import local_path


def key_of(kind: str, args: Any) -> str:
    """What a request is known by: the kind of answer wanted, and its text and settings."""
    return hashlib.sha256(json.dumps([kind, *args], sort_keys=True).encode()).hexdigest()


class AnswerStore:
    """Answers of one model in a SQLite file, as JSON; every answer is on disk when `keep` returns."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            try:
                (state,) = self._file.execute("PRAGMA quick_check").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(state)
                self._file.execute("CREATE TABLE IF NOT EXISTS about (facts TEXT)")
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, kind TEXT, answer TEXT)")
                if self._file.execute("SELECT count(*) FROM about").fetchone() == (0,):
                    self._file.execute("INSERT INTO about VALUES (?)", (json.dumps(about),))
            except BaseException:
                self._file.close()
                raise

    @classmethod
    @contextlib.contextmanager
    def for_model(
        cls, cache: str | Path, folder: str, how: Mapping[str, Any], versions: Mapping[str, str]
    ) -> Iterator[AnswerStore]:
        """The store for these weights, computed in this way; closed at the end."""
        cache = local_path(cache)
        if cache.exists() and not cache.is_dir():
            raise UsageError(
                f"the cache {str(cache)!r} is no folder. Give a folder, which is made if it does not exist."
            )
        about = {"files": _hashes(folder), "how": dict(how), "versions": dict(versions)}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        store = cls(cache / f"{Path(folder).resolve().name}-{digest}.sqlite", about)
        try:
            yield store
        finally:
            store._file.close()

    def answers(self, kind: str, keys: set[str]) -> dict[str, Any]:
        """Those of `keys` that are known."""
        with self._explained():
            rows = self._file.execute("SELECT key, answer FROM answers WHERE kind = ?", (kind,)).fetchall()
            found = {key: json.loads(answer) for key, answer in rows if key in keys}
            for key, answer in found.items():
                if kind == "loglikelihood":
                    number, is_greedy = answer
                    found[key] = (float(number), bool(is_greedy))
                elif not isinstance(answer, str if kind == "generate_until" else float):
                    raise ValueError(f"{kind} has the answer {answer!r}")
        return found

    def keep(self, key: str, kind: str, answer: Any) -> None:
        with self._explained():
            row = (key, kind, json.dumps(answer))
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as err:  # disk full, no permission, in use
            raise StorageError(
                f"cannot use the cache {str(self.path)!r}: {err}. Give another folder with --cache."
            ) from err
        except (sqlite3.DatabaseError, ValueError, TypeError) as err:
            raise CheckpointError(f"the cache {str(self.path)!r} is damaged: {err}. Delete it and run again.") from err


def _hashes(folder: str) -> dict[str, str]:
    """SHA-256 of every file of a model but for notes and what mendlm writes about a run."""
    names = [
        path.name
        for path in sorted(Path(folder).iterdir())
        if path.is_file() and not path.name.startswith(("mendlm.", ".")) and path.suffix != ".md"
    ]
    return {name: entry["sha256"] for name, entry in hash_files(Path(folder), names).items()}
