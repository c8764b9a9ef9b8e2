"""Which transport an agent tries, and when: a core.

QUIC is the better one and is tried first; WebSocket begins when QUIC has had its head start, and
the first whose handshake is complete is taken. How long the head start is depends on what worked
on this network before. Whoever is on WebSocket looks from time to time whether QUIC works again.
"""

from __future__ import annotations

from typing import Final, Literal

import attrs

from runtime.clock import NS_PER_S
from runtime.randomness import Randomness

TransportName = Literal["quic", "websocket"]

ALPN: Final = "holloway/1"
PATH: Final = "/channel"
SUBPROTOCOL: Final = "holloway.1"
MAX_NETWORKS: Final = 32


@attrs.frozen(kw_only=True)
class TransportOptions:
    """`websocket_after_ns` is QUIC's head start on a network that is not known;
    `websocket_after_known_quic_ns` where QUIC worked before: there the portal is more likely busy
    than UDP blocked. Where WebSocket worked last there is none. The first look for QUIC comes
    after `return_interval_ns`, each further one after twice as long up to `return_interval_cap_ns`,
    all of them jittered by half.
    """

    websocket_after_ns: int = NS_PER_S * 3 // 2
    websocket_after_known_quic_ns: int = 3 * NS_PER_S
    return_interval_ns: int = 30 * NS_PER_S
    return_interval_cap_ns: int = 600 * NS_PER_S


class TransportMemory:
    """What worked last on each network, of which the last MAX_NETWORKS are remembered. A network
    is known by the address that this machine has there: two that are taken for one cost a head
    start, no more."""

    def __init__(self, options: TransportOptions) -> None:
        self._options = options
        self._last_by_network: dict[str, TransportName] = {}

    def websocket_after_ns(self, network: str) -> int:
        """How long QUIC is to be alone in the race."""
        last = self._last_by_network.get(network)
        if last == "websocket":
            return 0
        if last == "quic":
            return self._options.websocket_after_known_quic_ns
        return self._options.websocket_after_ns

    def worked(self, network: str, transport: TransportName) -> None:
        self._last_by_network.pop(network, None)
        self._last_by_network[network] = transport
        while len(self._last_by_network) > MAX_NETWORKS:
            del self._last_by_network[next(iter(self._last_by_network))]


class ReturnTimes:
    """When to look for QUIC, from the beginning of a stay on WebSocket on."""

    def __init__(self, options: TransportOptions, randomness: Randomness) -> None:
        self._options = options
        self._randomness = randomness
        self._interval_ns = options.return_interval_ns

    def next_ns(self) -> int:
        """How long to wait before the next look."""
        interval_ns = self._interval_ns
        self._interval_ns = min(2 * interval_ns, self._options.return_interval_cap_ns)
        return interval_ns // 2 + self._randomness.integer(max(1, interval_ns))
