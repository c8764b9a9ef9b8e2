"""The window that accepts each transport counter once (RFC 6479, WireGuard whitepaper 5.4.6)."""

from __future__ import annotations

WINDOW_BITS = 8192
_WORD_BITS = 64
_WORDS = WINDOW_BITS // _WORD_BITS
# One word is always being refilled, so the part that is certain to be remembered is one shorter.
WINDOW_SIZE = WINDOW_BITS - _WORD_BITS


class ReplayWindow:
    """Remembers which of the latest counters arrived. Ask only after the tag was checked.

    A counter is accepted once; one that lies `WINDOW_SIZE` or more below the highest seen is
    refused, since whether it arrived is no longer known.
    """

    __slots__ = ("_greatest", "_words")

    def __init__(self) -> None:
        self._greatest = -1
        self._words = [0] * _WORDS

    def accept(self, counter: int) -> bool:
        """Note `counter` (0 to 2**64 - 1); False if it came before or is too old to tell."""
        greatest = self._greatest
        if counter + WINDOW_SIZE <= greatest:
            return False
        word = counter // _WORD_BITS
        if counter > greatest:
            current = greatest // _WORD_BITS
            for index in range(min(word - current, _WORDS)):
                self._words[(current + 1 + index) % _WORDS] = 0
            self._greatest = counter
        slot = word % _WORDS
        bit = 1 << (counter % _WORD_BITS)
        if self._words[slot] & bit:
            return False
        self._words[slot] |= bit
        return True
