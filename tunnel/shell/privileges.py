"""Giving away what an agent does not need: all capabilities but CAP_NET_ADMIN."""

from __future__ import annotations

import ctypes
import os
import struct

from runtime.memory import keep_memory_private

CAP_SETPCAP = 8
CAP_NET_ADMIN = 12
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAP_FILE = "/proc/sys/kernel/cap_last_cap"

_libc = ctypes.CDLL(None, use_errno=True)


def keep_only_network_administration() -> None:
    """Drop every capability but CAP_NET_ADMIN from this process and all that it starts.

    Without CAP_SETPCAP (a service manager has dropped it already) the capabilities stay as they
    are. The process leaves no core dump and cannot be traced by others of its user. Raises
    OSError.
    """
    keep_memory_private()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if not _effective() & 1 << CAP_SETPCAP:
        return
    with open(_LAST_CAP_FILE) as file:
        last = int(file.read())
    for capability in range(last + 1):
        if capability != CAP_NET_ADMIN:
            _prctl(_PR_CAPBSET_DROP, capability)
    kept = 1 << CAP_NET_ADMIN
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, of the lower and then of the upper 32 capabilities.
    if _libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)) != 0:
        raise _error("capset")


def _effective() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise _error("prctl")


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
