"""Randomness as a seam: cores draw from an object that is passed in.

`SystemRandomness` is for production. `SeededRandomness` gives every named user a stream of its
own, so that one more draw in one part of a simulation does not move the draws of another part.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableSequence, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, Protocol, TypeVar
from uuid import UUID

from runtime.clock import Clock

T = TypeVar("T")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Randomness(Protocol):
    """A source of random values. Both methods are uniform."""

    def bytes(self, n: int) -> bytes:
        """`n` random bytes (0 or more)."""

    def integer(self, below: int) -> int:
        """An integer in [0, below). Raises ValueError unless `below` is at least 1."""


class SystemRandomness:
    """The operating system's generator, fit for keys."""

    __slots__ = ()

    def bytes(self, n: int) -> bytes:
        return secrets.token_bytes(n)

    def integer(self, below: int) -> int:
        # As `secrets.randbelow` draws, without the layers of the module `random`.
        if below < 1:
            raise ValueError("the bound must be at least 1")
        bits = (below - 1).bit_length()
        size = (bits + 7) // 8
        while True:
            value = int.from_bytes(os.urandom(size), "big") >> 8 * size - bits
            if value < below:
                return value


class SeededRandomness:
    """A stream that depends only on `seed` and `name`: the same in every process and version.

    The stream is SHA-256 in counter mode. For simulations and tests: whoever knows the seed knows
    every "secret" drawn from it.
    """

    __slots__ = ("_buffer", "_counter", "_key", "_position", "name", "seed")

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.name = name
        self._key = sha256(f"holloway/1 randomness\0{seed}\0{name}".encode()).digest()
        self._counter = 0
        self._buffer = b""
        self._position = 0

    def bytes(self, n: int) -> bytes:
        if n < 0:
            raise ValueError("cannot draw a negative number of bytes")
        while len(self._buffer) - self._position < n:
            block = sha256(self._key + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
            self._buffer = self._buffer[self._position :] + block
            self._position = 0
        taken = self._buffer[self._position : self._position + n]
        self._position += n
        return taken

    def integer(self, below: int) -> int:
        if below < 1:
            raise ValueError("the bound must be at least 1")
        bits = (below - 1).bit_length()
        size = (bits + 7) // 8
        excess = 8 * size - bits
        while True:
            value = int.from_bytes(self.bytes(size), "big") >> excess
            if value < below:
                return value

    def child(self, name: str) -> SeededRandomness:
        """An independent stream named below this one; takes nothing from this one."""
        return SeededRandomness(self.seed, f"{self.name}/{name}")

    def __repr__(self) -> str:
        return f"SeededRandomness(seed={self.seed}, name={self.name!r})"


def shuffle(items: MutableSequence[T], randomness: Randomness) -> None:
    """Put `items` into a uniformly random order, in place (Fisher and Yates)."""
    for last in range(len(items) - 1, 0, -1):
        other = randomness.integer(last + 1)
        items[last], items[other] = items[other], items[last]


def choice(items: Sequence[T], randomness: Randomness) -> T:
    """One of `items`, uniformly. Raises ValueError when there is none."""
    return items[randomness.integer(len(items))]


def uuid7(clock: Clock, randomness: Randomness) -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7): Unix milliseconds, then a 12-bit fraction of the
    millisecond (section 6.2, method 3), then 62 random bits. Raises ValueError before 1970."""
    microseconds = (clock.utc_now() - _EPOCH) // _MICROSECOND
    if microseconds < 0:
        raise ValueError("a UUIDv7 cannot name an instant before 1970")
    milliseconds, rest = divmod(microseconds, 1_000)
    fraction = (rest << 12) // 1_000
    noise = int.from_bytes(randomness.bytes(8), "big") >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | noise)
