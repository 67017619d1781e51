"""Staging: a run works in a hidden sibling of OUT, which becomes OUT by one rename when everything is there.

``OUT.parent/.OUT.mendlm-partial/`` holds ``lock`` (held while a run is at work), ``journal.jsonl`` and ``out/``, the
folder in the making. Being on the same file system, ``out/`` can be renamed; being a folder of its own, it never holds
anything that does not belong into OUT.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mendlm.checkpoints.journal import Journal
from mendlm.checkpoints.writer import open_new, storage_errors
from mendlm.errors import StorageError, UsageError
from mendlm.paths import local_path

logger = logging.getLogger(__name__)

_NO_FSYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}  # some network file systems cannot sync a folder
_CHECKPOINT_FILES = ("config.json", "adapter_config.json", "mendlm.json")
_CHECKPOINT_SUFFIXES = (".safetensors", ".safetensors.index.json")
_REPLACES = "replaces"  # key of the fingerprint: this run was told to replace a folder that was there


def partial_folder(out: str | Path) -> Path:
    """Where a run that writes to `out` keeps unfinished work."""
    target = Path(os.path.realpath(local_path(out)))
    return target.parent / f".{target.name}.mendlm-partial"


def has_partial(out: str | Path) -> bool:
    """Whether an unfinished run into `out` can be resumed."""
    return (partial_folder(out) / "out").is_dir()


def is_filled(folder: Path) -> bool:
    """Whether a folder exists and holds anything."""
    return folder.is_dir() and any(folder.iterdir())


def check_replaceable(folder: str | Path, names: Iterable[str]) -> None:
    """Refuse to replace a folder, which holds `names`, unless it is empty or something is a checkpoint's.

    Raises
    ------
    UsageError : it holds other things alone; the sentence names one.
    """
    held = sorted(names)
    if not held or any(name in _CHECKPOINT_FILES or name.endswith(_CHECKPOINT_SUFFIXES) for name in held):
        return
    raise UsageError(
        f"{str(folder)!r} holds no config.json, safetensors or adapter but {held[0]!r}, so it is not a checkpoint and "
        "will not be overwritten. Remove it yourself, or choose another folder."
    )


def check_target(
    out: str | Path, model: Path, *, names: tuple[str, str] = ("OUT", "MODEL"), is_checkpoint: bool = True
) -> Path:
    """The real path of OUT, which is to be a checkpoint unless the caller says otherwise.

    Parameters
    ----------
    out, model : folders to write and to read.
    names : what the user calls the two.
    is_checkpoint : whether OUT is to be one.

    Raises
    ------
    UsageError : OUT is a file, is MODEL, lies in it or holds it, holds the current folder, or has a name that is too
        long; or, of one that is to be a checkpoint, as `check_replaceable`.
    """
    target, source = Path(os.path.realpath(local_path(out))), _local(model)
    to, of = names
    try:
        is_other = target.exists() and not target.is_dir()
        partial_folder(target).exists()
    except OSError as err:  # its name is too long, or that of the folder beside it
        raise UsageError(f"{to} {str(out)!r} cannot be made: {err.strerror or err}. Choose another folder.") from err
    if is_other:
        raise UsageError(f"{to} {str(out)!r} is a file. Give the name of a folder.")
    if source is not None and target.is_relative_to(source):
        raise UsageError(f"{to} {str(out)!r} is {of} or lies inside it. Choose a folder outside {str(model)!r}.")
    for path, what in (
        (source, of),
        (Path.cwd(), "the current folder"),
        (local_path("~"), "the home folder"),
    ):
        if path is not None and path.is_relative_to(target):
            raise UsageError(f"{to} {str(out)!r} holds {what}, which replacing it would remove. Choose a new folder.")
    if is_checkpoint and target.is_dir():
        with storage_errors(target):
            check_replaceable(out, (path.name for path in target.iterdir()))
    return target


def _local(folder: Path) -> Path | None:
    """The real path of a folder of this machine; None for one of an object store (`mendlm.checkpoints.remote`)."""
    return folder.resolve() if isinstance(folder, Path) else None


class Staging:
    """The staging folder of one run, locked; made by `open_staging`.

    Attributes
    ----------
    target : OUT.
    files : the folder in the making.
    journal : what is done already.
    """

    def __init__(self, target: Path, root: Path, lock: int, journal: Journal, made: tuple[Path, ...]):
        self.target = target
        self.files = root / "out"
        self.journal = journal
        self._root = root
        self._lock = lock
        self._made = made

    def release(self) -> None:
        """Leave the unfinished work for a later run with resume."""
        try:
            self.journal.sync()
        except StorageError as err:  # resuming checks what is there: an error that is on its way out matters more
            logger.warning("%s", err)
        finally:
            self.journal.close()
            os.close(self._lock)

    def discard(self) -> None:
        """Remove the unfinished work, and the parents of OUT that were made for it."""
        self.journal.close()
        shutil.rmtree(self._root, ignore_errors=True)
        os.close(self._lock)
        _remove_empty(self._made)

    def publish(self) -> None:
        """Turn the folder in the making into OUT, replacing an old OUT at this moment.

        Raises
        ------
        StorageError : it cannot be renamed; the unfinished work stays.
        """
        aside = self.target.parent / f".{self.target.name}.mendlm-old"
        with storage_errors(self.target):
            _sync_tree(self.files)
            if self.journal.fingerprint[_REPLACES] and is_filled(self.target):
                _remove(aside)
                self.target.rename(aside)
            try:
                self.files.rename(self.target)
            except OSError:
                if aside.is_dir() and not self.target.exists():
                    aside.rename(self.target)
                raise
            _sync_folder(self.target.parent)
        # OUT is complete and on the disk. What cannot be removed now costs space, and is removed by a later run.
        self.journal.close()
        for leftover in (aside, self._root):
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(self._lock)


def open_staging(target: Path, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Staging:
    """Lock the staging folder of OUT and decide whether to start or to continue.

    Parameters
    ----------
    target : OUT, as `check_target` returns it.
    fingerprint : everything that decides the bytes written; JSON-able. A run is continued only if it is the same.
    resume, overwrite : what the caller allows.

    Raises
    ------
    UsageError : OUT is not empty or unfinished work is there, and the caller does not allow to continue or replace
        it; or the unfinished work is that of another run.
    StorageError : another run is at work there, or the folder cannot be made.
    """
    root = partial_folder(target)
    if not overwrite and not root.exists() and is_filled(target):
        raise _not_empty(target)
    made = _make_parents(root)
    lock = -1
    try:
        with storage_errors(root):
            root.mkdir(exist_ok=True)
            _check_no_links(root)
        lock = lock_folder(root)
        journal = _continue(target, root, fingerprint, resume=resume, overwrite=overwrite)
        if journal is None:
            with storage_errors(root):
                _remove(root / "out")
                journal = Journal.create(root / "journal.jsonl", {**fingerprint, _REPLACES: overwrite})
                (root / "out").mkdir()
                for folder in (root, root.parent):  # or a power failure could lose the journal and keep the data
                    _sync_folder(folder)
    except BaseException:
        if lock >= 0:
            if not (root / "out").is_dir():
                shutil.rmtree(root, ignore_errors=True)
            os.close(lock)
        _remove_empty(made)
        raise
    return Staging(target, root, lock, journal, made)


def _continue(
    target: Path, root: Path, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Journal | None:
    """The journal to continue, or None to start anew; raises if neither is allowed."""
    unfinished = (root / "out").is_dir()
    if overwrite:
        return None
    if unfinished and not resume:
        raise UsageError(
            f"a previous run into {target.name!r} stopped half-way (its work is in {str(root)!r}). "
            "Pass --resume to continue it, or --overwrite to start anew."
        )
    journal = Journal.reopen(root / "journal.jsonl") if unfinished else None
    replaces = journal is not None and journal.fingerprint.get(_REPLACES, False)
    if is_filled(target) and not replaces:
        if journal is not None:
            journal.close()
        raise _not_empty(target)
    if journal is None:
        if unfinished:
            logger.warning("the journal in %s is missing or damaged: the work is done again", root)
        return None
    old = {key: value for key, value in journal.fingerprint.items() if key != _REPLACES}
    if changes := differences(old, fingerprint):
        journal.close()
        raise UsageError(
            f"the run to resume in {str(root)!r} is another one: {changes}. "
            "Use the same again, or pass --overwrite to start anew."
        )
    return journal


def _not_empty(target: Path) -> UsageError:
    return UsageError(f"{str(target)!r} exists and is not empty. Pass --overwrite, or choose another folder.")


def remove_leftovers(target: Path) -> None:
    """Remove what a run that was killed just after its last rename left beside a finished OUT."""
    root = partial_folder(target)
    if root.is_dir() and not (root / "out").exists():
        try:
            lock = lock_folder(root)
        except StorageError:
            return
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)
    _remove(target.parent / f".{target.name}.mendlm-old")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, for people; empty if nothing does."""
    parts: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if key == "inputs" and isinstance(was, dict) and isinstance(now, dict):
            names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            parts.append(f"input {', '.join(map(repr, names))} changed")
        elif key == "headers":
            parts.append("the header of an input file changed")
        elif isinstance(was, dict) and isinstance(now, dict):
            parts += [f"{k} was {was.get(k)!r}, now {now.get(k)!r}" for k in now if was.get(k) != now.get(k)]
        else:
            parts.append(f"{key} was {was!r}, now {now!r}")
    return "; ".join(parts)


def check_space(staging: Staging, needed_bytes: int) -> None:
    """Raise `StorageError` if the disk of OUT has no room for `needed_bytes`, counting what is allocated already."""
    with storage_errors(staging.files):
        allocated = sum(path.stat().st_blocks * 512 for path in staging.files.iterdir())
        free = shutil.disk_usage(staging.files).free
    missing = max(0, needed_bytes - allocated)
    if missing > free:
        raise StorageError(
            f"OUT {str(staging.target)!r} needs {missing / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free. "
            "Free some space, or write to another disk."
        )


def lock_folder(root: Path) -> int:
    """Lock a folder for this process, by its file ``lock``; the lock goes away with the process, however it ends."""
    path = root / "lock"
    fd = open_new(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other run may have finished, and removed the file, between our open and our lock.
        gone = not path.exists() or not os.path.samestat(os.fstat(fd), path.stat())
    except OSError as err:
        if err.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            logger.warning("this file system has no locks: make sure that no other run writes to the same folder")
            return fd
        if err.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            os.close(fd)
            raise StorageError(f"cannot lock {str(path)!r}: {err.strerror or err}.") from err
        gone = True
    if gone:
        os.close(fd)
        raise StorageError("another run is writing to the same OUT. Wait until it has finished, or choose another OUT.")
    return fd


def _check_no_links(root: Path) -> None:
    """Raise `StorageError` if someone put a link where this run would write: what it leads to would be overwritten."""
    for folder in (root, root / "out"):
        if folder.is_symlink():
            raise StorageError(f"{str(folder)!r} is a link, which is not followed. Remove it.")


def _make_parents(root: Path) -> tuple[Path, ...]:
    """Make the parents of OUT; the folders made, deepest first."""
    missing = [parent for parent in root.parents if not parent.exists()]
    with storage_errors(root.parent):
        root.parent.mkdir(parents=True, exist_ok=True)
    return tuple(missing)


def _remove_empty(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    """Wait until the names of everything in a folder are on the disk; files are synced by those who write them."""
    for path, _, _ in os.walk(folder, onerror=_raise):
        _sync_folder(Path(path))


def _raise(err: OSError) -> None:
    raise err


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(fd)
