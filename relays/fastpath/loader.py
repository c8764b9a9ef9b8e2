"""Programs and maps of the kernel by bpf(2) alone, called through ctypes: no library is needed.

Only what is in the kernel's UAPI header (linux/bpf.h) is used. Everything that is made is a file
descriptor, and the kernel takes it away with the last one: a program is attached as a link
(BPF_LINK_CREATE, Linux 5.9), so it is gone from the device when its process is, however that ended.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_MEMLOCK, setrlimit
from struct import Struct
from typing import Final, Literal

from relays.fastpath.elf import MapDefinition, ProgramObject

Mode = Literal["driver", "generic"]

LOG_BYTES: Final = 1 << 20
SHOWN_LOG_LINES: Final = 4
DELETE_ATTEMPTS: Final = 100

_SYSCALL_BY_MACHINE: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
}
_MAP_CREATE: Final = 0
_MAP_LOOKUP: Final = 1
_MAP_UPDATE: Final = 2
_MAP_DELETE: Final = 3
_MAP_NEXT_KEY: Final = 4
_PROGRAM_LOAD: Final = 5
_LINK_CREATE: Final = 28
_PROGRAM_TYPE_XDP: Final = 6
_ATTACH_XDP: Final = 37
_FLAG_OF_MODE: Final = {"generic": 1 << 1, "driver": 1 << 2}
_PER_CPU_KINDS: Final = (5, 6)

_CREATE: Final = Struct("=7I16s")
_ELEMENT: Final = Struct("=IIQQQ")
_KEY: Final = Struct("=IIQ")
_NEXT: Final = Struct("=IIQQ")
_LOAD: Final = Struct("=IIQQIIQII16sII")
_LINK: Final = Struct("=IIII")
_POSSIBLE_CPUS: Final = Path("/sys/devices/system/cpu/possible")


class BpfError(OSError):
    """The kernel refused; `strerror` says what was tried, and what the verifier said."""


def bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    """bpf(2). Raises BpfError."""
    number = _SYSCALL_BY_MACHINE.get(platform.machine())
    if number is None or sys.byteorder != "little":
        raise BpfError(errno.ENOSYS, f"not built for {platform.machine()}")
    result = _syscall(number, command, ctypes.byref(attributes), len(attributes))
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError(code, os.strerror(code))
    return result


class BpfMap:
    """A map of the kernel. Keys and values are bytes of exactly its sizes."""

    def __init__(self, definition: MapDefinition, descriptor: int | None = None) -> None:
        """Make one, or take over one that another process has made: `descriptor` is closed with
        this then. Raises BpfError."""
        self.definition = definition
        self.descriptor = _create(definition) if descriptor is None else descriptor
        self._copies = possible_cpus() if definition.kind in _PER_CPU_KINDS else 1
        self._stride = definition.value_bytes
        if self._copies > 1 or definition.kind in _PER_CPU_KINDS:
            self._stride += -self._stride % 8
        self._key = ctypes.create_string_buffer(definition.key_bytes)
        self._value = ctypes.create_string_buffer(self._stride * self._copies)
        self._attributes = _buffer(
            _ELEMENT.pack(
                self.descriptor, 0, ctypes.addressof(self._key), ctypes.addressof(self._value), 0
            )
        )
        self._for_deletion = _buffer(_KEY.pack(self.descriptor, 0, ctypes.addressof(self._key)))

    def update(self, key: bytes, value: bytes) -> None:
        """Set what is under `key`. Raises BpfError, with E2BIG when the map is full."""
        self._put(self._key, key)
        self._put(self._value, value)
        bpf(_MAP_UPDATE, self._attributes)

    def delete(self, key: bytes) -> None:
        """Remove what is under `key`, if anything is. Raises BpfError."""
        self._put(self._key, key)
        for attempt in range(DELETE_ATTEMPTS):
            try:
                bpf(_MAP_DELETE, self._for_deletion)
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    return
                if error.errno != errno.EBUSY or attempt == DELETE_ATTEMPTS - 1:
                    raise
            else:
                return

    def lookup(self, key: bytes) -> list[bytes]:
        """The value under `key`, one for each possible CPU where the map has them so; empty when
        there is none. Raises BpfError."""
        self._put(self._key, key)
        try:
            bpf(_MAP_LOOKUP, self._attributes)
        except BpfError as error:
            if error.errno == errno.ENOENT:
                return []
            raise
        raw, size = self._value.raw, self.definition.value_bytes
        return [raw[at : at + size] for at in range(0, len(raw), self._stride)]

    def all_keys(self) -> list[bytes]:
        """All that are there; keys that come or go meanwhile may be in it or not, some twice.
        Raises BpfError."""
        found: list[bytes] = []
        after = ctypes.create_string_buffer(self.definition.key_bytes)
        key_at = 0  # none: begin
        while len(found) < 2 * self.definition.max_entries:
            raw = _NEXT.pack(self.descriptor, 0, key_at, ctypes.addressof(after))
            try:
                bpf(_MAP_NEXT_KEY, _buffer(raw))
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    break
                raise
            found.append(after.raw)
            self._put(self._key, after.raw)
            key_at = ctypes.addressof(self._key)
        return found

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @staticmethod
    def _put(place: ctypes.Array[ctypes.c_char], content: bytes) -> None:
        if len(content) != len(place):
            raise ValueError(f"{len(content)} bytes where {len(place)} are needed")
        place.raw = content


class LoadedProgram:
    """A program that the verifier has let in, with its maps. Close it when done: that detaches it
    too."""

    def __init__(self, program: ProgramObject, name: str) -> None:
        """Make the maps and load it. Raises BpfError."""
        self.maps: dict[str, BpfMap] = {}
        self.descriptor = -1
        self._links: list[int] = []
        try:
            for definition in program.maps:
                self.maps[definition.name] = BpfMap(definition)
            descriptors = {name: made.descriptor for name, made in self.maps.items()}
            self.descriptor = _load(program.linked(descriptors), program.license, name)
        except BaseException:
            self.close()
            raise

    def attach(self, device_index: int, mode: Mode) -> None:
        """Have the device run it for every packet that comes in. Raises BpfError."""
        attributes = _buffer(
            _LINK.pack(self.descriptor, device_index, _ATTACH_XDP, _FLAG_OF_MODE[mode])
        )
        self._links.append(_tried(f"{mode} mode", _LINK_CREATE, attributes))

    def detach(self) -> None:
        """From all devices."""
        while self._links:
            os.close(self._links.pop())

    def close(self) -> None:
        self.detach()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        for made in self.maps.values():
            made.close()


def possible_cpus() -> int:
    """How many copies a per-CPU map keeps. Raises OSError, ValueError."""
    last = _POSSIBLE_CPUS.read_text().strip().replace(",", "-").split("-")[-1]
    return int(last) + 1


def _create(definition: MapDefinition) -> int:
    with suppress(ValueError, OSError):  # before Linux 5.11 maps count as locked memory
        setrlimit(RLIMIT_MEMLOCK, (RLIM_INFINITY, RLIM_INFINITY))
    attributes = _buffer(
        _CREATE.pack(
            definition.kind,
            definition.key_bytes,
            definition.value_bytes,
            definition.max_entries,
            definition.flags,
            0,
            0,
            definition.name.encode()[:15],
        )
    )
    return _tried(f"map {definition.name}", _MAP_CREATE, attributes)


def _load(instructions: bytes, license: bytes, name: str) -> int:
    """First without a log: the verifier is faster so, and the log is only for when it says no."""
    try:
        return _try_to_load(instructions, license, name, None)
    except BpfError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise BpfError(error.errno, f"loading the program: {error.strerror}") from None
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        return _try_to_load(instructions, license, name, log)
    except BpfError as error:
        lines = log.value.decode(errors="replace").strip().splitlines()
        said = " / ".join(lines[-SHOWN_LOG_LINES:])
        raise BpfError(error.errno, f"loading the program: {error.strerror}; {said}") from None


def _try_to_load(
    instructions: bytes, license: bytes, name: str, log: ctypes.Array[ctypes.c_char] | None
) -> int:
    code, terms = _buffer(instructions), ctypes.create_string_buffer(license)
    attributes = _buffer(
        _LOAD.pack(
            _PROGRAM_TYPE_XDP,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(terms),
            0 if log is None else 1,
            0 if log is None else len(log),
            0 if log is None else ctypes.addressof(log),
            0,
            0,
            name.encode()[:15],
            0,
            _ATTACH_XDP,
        )
    )
    return bpf(_PROGRAM_LOAD, attributes)


def _tried(what: str, command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    try:
        return bpf(command, attributes)
    except BpfError as error:
        raise BpfError(error.errno, f"{what}: {error.strerror}") from None


def _buffer(content: bytes) -> ctypes.Array[ctypes.c_char]:
    """These bytes, and no zero behind them."""
    return ctypes.create_string_buffer(content, len(content))


def _make_syscall() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    return function


_syscall: Final = _make_syscall()
