"""What a process holds in memory stays there: no core dump, and no other process may look.

Python cannot wipe a value that it has dropped (see docs/security.md), so the memory of every
component may hold tokens and keys for as long as it lives.
"""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4


def keep_memory_private() -> None:
    """No core dump of this process, whatever the system's pattern for them is, and nobody but
    root may attach to it or read its /proc files. What it starts inherits the first part.

    Call it before the first secret is read. Raises OSError.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")


def is_memory_private() -> bool:
    """Whether `keep_memory_private` holds for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    dumpable = libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    return dumpable == 0 and resource.getrlimit(resource.RLIMIT_CORE)[1] == 0
