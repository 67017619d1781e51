"""Object stores: checkpoints read from, and written to, any URL that fsspec knows (``s3://``, ``gs://``, ``memory://``).

A remote MODEL is a `UPath` where a local one is a `Path`: headers and single tensors are read by range, nothing is
copied to the disk first. A remote OUT is made in a folder on this machine, with its journal and its lock, and sent
when it is complete; ``mendlm.json`` goes last, so that what is there without it is known to be unfinished.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mendlm.checkpoints.staging import check_replaceable, has_partial, is_filled
from mendlm.checkpoints.writer import storage_errors
from mendlm.errors import CheckpointError, MissingDependencyError, StorageError, UsageError
from mendlm.paths import is_file_url, local_path

logger = logging.getLogger(__name__)

R = TypeVar("R")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://.")
_LAST = ("config.json", "mendlm.json")  # sent after everything else, in this order


def is_url(place: str | Path | Any) -> bool:
    """Whether a place is the URL, or its `UPath`, of an object store; ``file://`` is a folder of this machine."""
    return _URL.match(str(place)) is not None and not is_file_url(place)


def open_place(place: str | Path) -> Path:
    """The folder at a place: a `Path`, or a `UPath`, which is used alike, for a URL.

    Raises
    ------
    UsageError : a URL of a protocol that fsspec does not know.
    MissingDependencyError : universal_pathlib, or the file system's own package (s3fs, gcsfs), is not installed.
    """
    if not is_url(place):
        return local_path(place)
    try:
        from upath import UPath
    except ImportError as err:
        raise MissingDependencyError(
            f"{str(place)!r} is a URL, which needs universal_pathlib. Run: pip install 'mendlm[remote]'."
        ) from err
    try:
        path: Any = UPath(place)
        _ = path.fs
    except ValueError as err:
        raise UsageError(f"{str(place)!r} is of no protocol that fsspec knows ({err}). Check its first part.") from err
    except ImportError as err:
        raise MissingDependencyError(f"{str(place)!r} cannot be opened: {str(err).rstrip('.')}.") from err
    found: Path = path
    return found


def check_url(out: str, model: str | Path) -> None:
    """Refuse the URL of an OUT that is MODEL's, or whose files would be mixed with those of MODEL.

    Raises
    ------
    UsageError : OUT is MODEL, lies in it or holds it; or as `open_place`.
    MissingDependencyError : as `open_place`.
    """
    target, source = (_place_in_store(place) for place in (out, model))
    if target is None or source is None or target[0] is not source[0]:
        return
    if target[1].is_relative_to(source[1]):
        raise UsageError(f"OUT {out!r} is MODEL or lies inside it. Choose a folder outside {str(model)!r}.")
    if source[1].is_relative_to(target[1]):
        raise UsageError(f"OUT {out!r} holds MODEL {str(model)!r}. Choose a folder of its own.")


def _place_in_store(place: str | Path) -> tuple[type, PurePosixPath] | None:
    """(kind of store, place in it) of a URL, however it is written; None for a folder of this machine."""
    if not is_url(place):
        return None
    path: Any = open_place(place)
    return type(path.fs), PurePosixPath(posixpath.normpath(path.path))


@contextmanager
def remote_errors(url: str, *, writing: bool) -> Iterator[None]:
    """Turn what a remote file system raises into a `StorageError` or a `CheckpointError` that names the URL."""
    try:
        yield
    except (CheckpointError, StorageError, UsageError):
        raise
    except Exception as err:  # every file system has exceptions of its own
        reason = (str(err).strip() or type(err).__name__).splitlines()[0].rstrip(" .")
        if writing:
            raise StorageError(f"cannot write {url!r}: {reason}. Run again with --resume.") from err
        raise CheckpointError(f"cannot read {url!r}: {reason}.") from err


def staging_target(url: str) -> Path:
    """The folder on this machine in which what goes to `url` is made: in MENDLM_STAGING, else in the user's cache."""
    base = os.environ.get("MENDLM_STAGING")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = local_path(base) if base else Path(cache) / "mendlm" / "staging"
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return root / f"{digest}-{re.sub('[^A-Za-z0-9._-]', '_', url.rstrip('/').rpartition('/')[2])}"


class RemoteFolder:
    """What is at the URL of an OUT.

    Parameters
    ----------
    url : where it is.

    Raises
    ------
    UsageError, MissingDependencyError : as `open_place`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.path: Any = open_place(self.url)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of the files directly in it; empty if there is nothing.

        Raises
        ------
        UsageError : it is a file.
        CheckpointError : the store cannot be reached.
        """
        fs = self.path.fs
        with remote_errors(self.url, writing=False):
            fs.invalidate_cache()
            if not fs.exists(self.path.path):
                return {}
            if fs.isfile(self.path.path):
                raise UsageError(f"OUT {self.url!r} is a file. Give the name of a folder.")
            entries = fs.ls(self.path.path, detail=True)
        files = (entry for entry in entries if entry["type"] == "file")
        return {PurePosixPath(entry["name"]).name: int(entry["size"] or 0) for entry in files}

    def clear(self) -> None:
        """Remove the files in it, ``mendlm.json`` first: from then on it is known to be unfinished."""
        with remote_errors(self.url, writing=True):
            for name in sorted(self.sizes(), key=_order, reverse=True):
                (self.path / name).unlink()

    def send(self, folder: Path, sent: Path) -> None:
        """Copy the files of `folder` to it, those that decide last.

        Parameters
        ----------
        folder : a complete OUT.
        sent : a file that lists what is there already, a name a line; added to after each file. What the store has lost
            since is sent again.

        Raises
        ------
        StorageError : the store refuses, cannot be reached or lost something. What is in `folder` stays.
        """
        listed = set(sent.read_text(encoding="utf-8").splitlines()) if sent.exists() else set()
        size_of = {path.name: path.stat().st_size for path in folder.iterdir()}
        names = sorted(size_of, key=lambda name: (_order(name), name))
        with remote_errors(self.url, writing=True), sent.open("a", encoding="utf-8") as log:
            self.path.mkdir(parents=True, exist_ok=True)
            there = self.sizes()
            left = [name for name in names if name not in listed or there.get(name) != size_of[name]]
            if left and left[-1] != names[-1]:  # it says complete, and that is not so
                (self.path / names[-1]).unlink()
                left.append(names[-1])
            for name in left:
                self.path.fs.put_file(str(folder / name), (self.path / name).path)
                log.write(f"{name}\n")
                log.flush()
                logger.info("sent %s to %s", name, self.url)
            there = self.sizes()
            for name in names:
                if there.get(name) != size_of[name]:
                    raise StorageError(f"{name!r} at {self.url!r} is not what was sent. Run again with --resume.")


def deliver(
    url: str, make: Callable[[Path], R], finished: Callable[[Path], R], *, overwrite: bool, resume: bool
) -> tuple[R, Path]:
    """Make an OUT on this machine, send it to `url` and remove it here; what was made, and where it is.

    Parameters
    ----------
    url : of OUT.
    make : makes or continues OUT in a folder of this machine.
    finished : checks that a complete OUT is what this run would give, and returns what `make` would.
    overwrite, resume : what the caller allows.

    Raises
    ------
    UsageError : OUT is not empty, or unfinished work is there, and the caller does not allow to replace or continue it;
        or as `check_replaceable`.
    StorageError : as `RemoteFolder.send`; or others have put files there since the run began, and the caller does not
        allow to replace them. What was made stays on this machine, and `resume` sends the rest.
    """
    remote, target = RemoteFolder(url), staging_target(url)
    sent, replaces = (target.with_name(f"{target.name}.{what}") for what in ("sent", "replaces"))
    there, begun = remote.sizes(), is_filled(target) or has_partial(target)
    if resume and not begun and _LAST[-1] in there:
        return finished(remote.path), remote.path
    if not begun:  # marks of a run that failed, whose work is gone, allow nothing
        for mark in (sent, replaces):
            mark.unlink(missing_ok=True)
    if begun and not overwrite and not resume:
        raise UsageError(
            f"a previous run into {remote.url!r} stopped half-way (its work is in {str(target.parent)!r}). "
            "Pass --resume to continue it, or --overwrite to start anew."
        )
    if there and not overwrite and not (begun and (sent.exists() or replaces.exists())):
        raise UsageError(f"{remote.url!r} exists and is not empty. Pass --overwrite, or choose another folder.")
    if overwrite and not sent.exists() and not replaces.exists():  # else an earlier run was allowed to replace it
        check_replaceable(remote.url, there)
    if overwrite:  # what was sent before is of another run
        sent.unlink(missing_ok=True)
        with storage_errors(replaces):
            replaces.parent.mkdir(parents=True, exist_ok=True)
            replaces.touch()
    made = make(target)
    if not sent.exists() and (there := remote.sizes()):  # as the work may have taken hours
        if not replaces.exists():
            raise StorageError(
                f"OUT {remote.url!r} was empty when the run began and now holds {min(there)!r}, of another run "
                "perhaps. Nothing was sent: move what is there away and run again with --resume."
            )
        remote.clear()
    remote.send(target, sent)
    shutil.rmtree(target, ignore_errors=True)
    for mark in (sent, replaces):
        mark.unlink(missing_ok=True)
    return made, remote.path


def _order(name: str) -> int:
    return _LAST.index(name) + 1 if name in _LAST else 0
