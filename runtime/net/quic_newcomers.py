"""Clients that wait for the beginning of their handshake, a core.

A handshake costs a hundred times what other datagrams do. So a listener has newcomers wait, in
order, and begins with one at a time after everything else that has come was done. In a storm the
handshakes that were begun end soon (before a client repeats itself, which would cost more), and
those who are connected are served as ever. A client repeats its first flight while it waits; who
was not heard for PATIENCE_S has given up, and costs nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import attrs

from runtime.net.address import Address

PATIENCE_S: Final = 3.0
MAX_DATAGRAMS: Final = 4
"""That are kept of one newcomer: a first flight, with room for a large key exchange."""


@attrs.define(eq=False, kw_only=True)
class Newcomer:
    """A client at its first flight. `cid` is the connection id that it sends to, `retry_cid` the
    same if that was given by a Retry, `original_cid` the one before. `heard_at` is in seconds."""

    cid: bytes
    source: str
    sender: Address
    original_cid: bytes
    retry_cid: bytes | None
    heard_at: float
    datagrams: list[bytes]


class Newcomers:
    """A queue of them; whoever fills it looks at its length first."""

    def __init__(self) -> None:
        self._by_cid: dict[bytes, Newcomer] = {}
        self._by_source: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_cid)

    def of_source(self, source: str) -> int:
        """How many wait that came from there."""
        return self._by_source[source]

    def put(self, newcomer: Newcomer) -> None:
        self._by_cid[newcomer.cid] = newcomer
        self._by_source[newcomer.source] += 1

    def heard(self, cid: bytes, data: bytes, sender: Address, now: float) -> bool:
        """Whether a datagram is of one that waits; it is kept for when its turn comes."""
        newcomer = self._by_cid.get(cid)
        if newcomer is None:
            return False
        if sender == newcomer.sender:
            newcomer.heard_at = now
            if len(newcomer.datagrams) < MAX_DATAGRAMS:
                newcomer.datagrams.append(data)
        return True

    def take(self, now: float) -> Newcomer | None:
        """The one whose turn it is; None when nobody waits any more."""
        while self._by_cid:
            newcomer = self._by_cid.pop(next(iter(self._by_cid)))
            self._by_source[newcomer.source] -= 1
            if not self._by_source[newcomer.source]:
                del self._by_source[newcomer.source]
            if now - newcomer.heard_at < PATIENCE_S:
                return newcomer
        return None
