"""Distributions of times in bounded memory: a histogram whose bins grow with what they hold.

Each power of two has 32 bins, so a value is known to within 1/32 (some 3 %), however many there
are and however far they spread; two thousand bins reach from a nanosecond to a century. Least,
greatest, count and sum are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

_SUB_BITS: Final = 5
_SUB: Final = 1 << _SUB_BITS


@attrs.define(kw_only=True)
class Distribution:
    """Times in nanoseconds, 0 or more. `bins` counts by bin number (`bin_of`)."""

    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0
    bins: dict[int, int] = attrs.Factory(dict)

    @classmethod
    def of(cls, values: Iterable[int]) -> Distribution:
        made = cls()
        for value in values:
            made.add(value)
        return made

    def add(self, value: int) -> None:
        """Count one more. What is below 0 counts as 0."""
        value = max(value, 0)
        self.least = value if not self.count else min(self.least, value)
        self.most = max(self.most, value)
        self.count += 1
        self.total += value
        number = bin_of(value)
        self.bins[number] = self.bins.get(number, 0) + 1

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> int | None:
        """The value that `share` (0 to 1) of all do not exceed, to within a bin; None of none."""
        if not self.count:
            return None
        wanted = share * self.count
        seen = 0
        for number in sorted(self.bins):
            seen += self.bins[number]
            if seen >= wanted:
                return min(max(middle_of(number), self.least), self.most)
        return self.most

    def steps(self) -> Iterator[tuple[int, float]]:
        """(value, share of all that do not exceed it), ascending: the empirical distribution."""
        seen = 0
        for number in sorted(self.bins):
            seen += self.bins[number]
            yield min(max(middle_of(number), self.least), self.most), seen / self.count


def bin_of(value: int) -> int:
    """The number of the bin of a value of 0 or more; the lowest have one value each."""
    shift = max(value.bit_length() - _SUB_BITS - 1, 0)
    return (shift << _SUB_BITS) + (value >> shift)


def middle_of(number: int) -> int:
    """The value in the middle of a bin."""
    if number < 2 * _SUB:
        return number
    shift = (number >> _SUB_BITS) - 1
    low = ((number & (_SUB - 1)) + _SUB) << shift
    return low + (1 << shift >> 1)
