"""Quantities as people write them in scenario files: `20ms`, `50Mbit`, `64KiB`, `1%`.

All become integers in the unit that the code's names end with: nanoseconds, bits per second, bytes,
parts per million.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

MAX_DURATION_NS: Final = 366 * 86_400 * 10**9
PPM: Final = 1_000_000

_DURATIONS: Final = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "min": 60 * 10**9,
    "h": 3_600 * 10**9,
    "d": 86_400 * 10**9,
}
_RATES: Final = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_SIZES: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SHARES: Final = {"%": 10_000, "ppm": 1, "": PPM}
_QUANTITY: Final = re.compile(r"(-?\d{1,12}(?:\.\d{1,9})?) ?([A-Za-z%]*)", re.ASCII)


def duration_ns(text: str, *, least: int = 0) -> int:
    """`1.5s` is 1_500_000_000. Units: ns, us, ms, s, min, h, d. Raises ValueError, also for what
    is below `least` or above a year."""
    return _quantity(text, _DURATIONS, "a duration such as 20ms or 1.5s", least, MAX_DURATION_NS)


def signed_duration_ns(text: str) -> int:
    """As `duration_ns`, negative ones too. Raises ValueError."""
    return duration_ns(text, least=-MAX_DURATION_NS)


def rate_bit_per_s(text: str) -> int:
    """`50Mbit` is 50_000_000. Units: bit, kbit, Mbit, Gbit (per second). Raises ValueError."""
    return _quantity(text, _RATES, "a rate such as 50Mbit", 1, 10**12)


def size_bytes(text: str) -> int:
    """`64KiB` is 65_536. Units: B, KiB, MiB, GiB. Raises ValueError."""
    return _quantity(text, _SIZES, "a size such as 64KiB", 1, 1 << 40)


def share_ppm(text: str | float) -> int:
    """`1%`, `500ppm` or 0.01, as parts per million. Raises ValueError outside of 0 to 1."""
    if isinstance(text, float):
        text = format(Decimal(repr(text)), "f")  # without an exponent, however small
    return _quantity(str(text), _SHARES, "a share such as 1% or 0.01", 0, PPM)


def _quantity(text: str, units: dict[str, int], wanted: str, least: int, most: int) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ValueError(f"not {wanted}: {text[:40]!r}")
    value = Decimal(match[1]) * units[match[2]]
    if value != int(value):
        raise ValueError(f"finer than can be told apart: {text[:40]!r}")
    if not least <= value <= most:
        raise ValueError(f"out of range: {text[:40]!r}")
    return int(value)
