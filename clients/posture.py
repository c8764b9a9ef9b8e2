"""What a client's device can honestly say of itself on Linux: the facts that policies ask for.

A fact that cannot be known for certain is not reported, and then satisfies no condition. Nothing
here is proved to the portal: a device's owner with root can have it say anything, so posture tells
apart devices that are well kept from those that are not, and does not hold against their owners.

| fact | value | from |
|---|---|---|
| `os_name` | `debian` | os-release(5), `ID` |
| `os_version` | `12` | os-release(5), `VERSION_ID`; a rolling distribution has none |
| `kernel_version` | `6.1.0` | uname(2), without what follows the numbers |
| `agent_version` | `0.1.0` | the installed package |
| `disk_encrypted` | true or false | whether all below the root filesystem is under dm-crypt |

`disk_encrypted` is not reported where the root filesystem lies on no block device of its own
(overlay, btrfs, ZFS, NFS) or on one whose disk is somewhere else (loop, network block devices). It
is false for disks that encrypt themselves: the kernel cannot tell.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Final

from channel.messages import ReportedFact
from runtime.version import product_version

MAX_DEPTH: Final = 16
"""Of devices upon devices."""
MAX_OS_RELEASE_BYTES: Final = 65_536

_NUMBERS = re.compile(r"\d+(?:\.\d+)*")
_ELSEWHERE = re.compile(r"loop|nbd|rbd|drbd|zram|ram")
_DEVICE = re.compile(r"\d+:\d+")


def survey(root: Path = Path("/")) -> tuple[ReportedFact, ...]:
    """The facts of this device, by name. `root` holds its etc/ and sys/."""
    os_release = _os_release(root)
    found = {
        "agent_version": product_version(),
        "disk_encrypted": is_disk_encrypted(root, _root_device()),
        "kernel_version": _numbers(platform.release()),
        "os_name": os_release.get("ID"),
        "os_version": os_release.get("VERSION_ID"),
    }
    return tuple(
        ReportedFact(name=name, value=value)
        for name, value in found.items()
        if isinstance(value, bool) or (value is not None and _is_tellable(value))
    )


def is_disk_encrypted(root: Path, device: str) -> bool | None:
    """Whether all that a block device (`major:minor`) is made of is under dm-crypt; None if that
    cannot be told."""
    if not _DEVICE.fullmatch(device) or device.startswith("0:"):
        return None
    return _is_encrypted(root / "sys" / "dev" / "block" / device, MAX_DEPTH)


def _is_encrypted(device: Path, depth: int) -> bool | None:
    if not depth or not device.is_dir() or _ELSEWHERE.match(device.resolve().name):
        return None
    if _read(device / "dm" / "uuid").startswith("CRYPT-"):
        return True
    try:
        below = sorted((device / "slaves").iterdir())
    except OSError:
        below = []
    answers = [_is_encrypted(each, depth - 1) for each in below]
    if not answers:
        return None if (device / "dm").exists() else False
    if False in answers:
        return False
    return None if None in answers else True


def _root_device() -> str:
    number = os.stat("/").st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def _os_release(root: Path) -> dict[str, str]:
    """ID and the like, unquoted; the first of both files that is there counts."""
    for place in ("etc/os-release", "usr/lib/os-release"):
        text = _read(root / place)
        if text:
            pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
            return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}
    return {}


def _numbers(text: str) -> str | None:
    found = _NUMBERS.match(text)
    return None if found is None else found.group()


def _is_tellable(value: str) -> bool:
    return 0 < len(value) <= 255 and value.isprintable()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_OS_RELEASE_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""
