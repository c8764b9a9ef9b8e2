"""Files that a crash leaves whole: the old content or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, content: bytes, *, mode: int) -> None:
    """Replace the file at once; it is on the disk when this returns. Raises OSError.

    It has its mode before it has content. What a crash left beside it (`.new`) is replaced.
    """
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(beside, flags, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
