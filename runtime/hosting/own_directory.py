"""Directories of a Ray that ends with this process, and the removal of those that were left behind.

Ray's sockets need a short path, so such a directory is where the machine keeps temporary files. One
that belonged to a process that was killed stays. Each has a file `lock`, which is locked (flock(2))
before it gets that name, and is held until the last process is gone that was given its descriptor.
What is removed later is a directory with our prefix, of our user alone, whose lock is there and is
held by nobody; a name alone is no reason to remove anything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import attrs

from runtime.service import get_logger

PREFIX: Final = "hw-"
LOCK: Final = "lock"

_log = get_logger("cluster.hosting")


@attrs.frozen
class OwnDirectory:
    """A directory (0700) that nobody else uses. `lock` is the descriptor that holds it: give it to
    the processes that work in it, so that it is not removed while they live."""

    path: Path
    lock: int


@contextmanager
def open_own_directory(parent: Path | None = None) -> Iterator[OwnDirectory]:
    """A new directory, which is removed after the block. First removes those in `parent` (that of
    temporary files) that were left behind. Raises OSError."""
    parent = parent or Path(tempfile.gettempdir())
    remove_left_behind(parent)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    unlocked = path / f"{LOCK}.new"
    lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unlocked.rename(path / LOCK)
        yield OwnDirectory(path, lock)
    finally:
        _remove(path)
        os.close(lock)


def remove_left_behind(parent: Path) -> list[Path]:
    """Remove the directories of processes that are gone, and tell which those were. Never raises:
    what cannot be looked at or removed stays."""
    with suppress(OSError):
        found = sorted(path for path in parent.iterdir() if path.name.startswith(PREFIX))
        return [path for path in found if _remove_if_left_behind(path)]
    return []


def _remove_if_left_behind(path: Path) -> bool:
    directory = lock = -1
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not _is_ours(directory, stat.S_IFDIR):
            return False
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(LOCK, flags, dir_fd=directory)
        if not _is_ours(lock, stat.S_IFREG):
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no directory, no lock, or one that is held
        return False
    else:
        _remove(path)
        _log.info("directory_removed", path=str(path), reason="its process was killed")
        return True
    finally:
        for descriptor in (lock, directory):
            if descriptor >= 0:
                os.close(descriptor)


def _is_ours(descriptor: int, kind: int) -> bool:
    """Whether it is of this kind and our user's, and nobody else may touch it."""
    status = os.fstat(descriptor)
    is_closed = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return is_closed and status.st_uid == os.geteuid() and stat.S_IFMT(status.st_mode) == kind


def _remove(path: Path) -> None:
    """The lock last: should this be cut short, the rest is still known for what it is."""
    with suppress(OSError):
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()
    with suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
        path.rmdir()
