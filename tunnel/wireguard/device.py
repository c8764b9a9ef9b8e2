"""A WireGuard device as a core: one static key, many peers, the table of indices, cookies.

Datagrams come in by `receive` and inner packets by `send`; `drain_datagrams` and `drain_events`
hand out what came of it; `poll_timeout` tells when `handle_timeout` wants to be called. Nothing a
datagram contains makes any of these raise: what is refused is counted in `statistics()`.

Which inner source addresses a peer may use is decided by the caller, who knows the peer's key.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

import attrs

from runtime.net.address import Address
from runtime.randomness import Randomness
from tunnel.wireguard.cookies import CookieChecker, LoadGauge
from tunnel.wireguard.noise import (
    COOKIE_BYTES,
    INITIATION_BYTES,
    KEY_BYTES,
    MESSAGE_COOKIE,
    MESSAGE_INITIATION,
    MESSAGE_RESPONSE,
    MESSAGE_TRANSPORT,
    RESPONSE_BYTES,
    TRANSPORT_MIN_BYTES,
    HandshakeError,
    StaticKey,
    open_initiation,
)
from tunnel.wireguard.peer import (
    NEVER_NS,
    Event,
    HandshakeFailed,
    KeyPair,
    Peer,
    PeerStatistics,
    SessionEstablished,
    SessionExpired,
)

__all__ = [
    "Device",
    "DeviceStatistics",
    "Event",
    "HandshakeFailed",
    "PeerStatistics",
    "SessionEstablished",
    "SessionExpired",
]

INNER_MTU = 1280


@attrs.define(kw_only=True)
class DeviceStatistics:
    """Counts since the device was made."""

    malformed: int = 0
    invalid_mac1: int = 0
    refused_handshakes: int = 0
    limited_handshakes: int = 0
    cookies_sent: int = 0
    unknown_index: int = 0
    refused_transports: int = 0
    unknown_peer: int = 0
    peers: int = 0


class Device:
    """One end of any number of WireGuard tunnels.

    `mtu` is the inner MTU, beyond which padding does not go. `timestamp_offset_ns` is added to
    `now` for the TAI64N labels: 0 is right for a key made at this start, the Unix time minus
    `now` for a key that outlives it (a peer refuses labels that do not rise).
    """

    def __init__(
        self,
        private_key: bytes,
        *,
        randomness: Randomness,
        now: int,
        mtu: int = INNER_MTU,
        timestamp_offset_ns: int = 0,
    ) -> None:
        self._static = StaticKey.of(private_key)
        self._randomness = randomness
        self._mtu = mtu
        self._timestamp_offset_ns = timestamp_offset_ns
        self._peer_by_key: dict[Hashable, Peer] = {}
        self._peer_by_public: dict[bytes, Peer] = {}
        self._holder_by_index: dict[int, tuple[Peer, KeyPair | None]] = {}
        self._checker = CookieChecker(self._static.public, randomness)
        self._load = LoadGauge(now)
        self._datagrams: list[tuple[Hashable | Address, bytes]] = []
        self._events: list[Event] = []
        self._wakes: list[tuple[int, int, Peer]] = []
        self._wake_number = 0
        self._counts = DeviceStatistics()

    @property
    def public_key(self) -> bytes:
        """32 bytes that a peer needs to know."""
        return self._static.public

    def add_peer(
        self,
        peer_key: Hashable,
        *,
        public_key: bytes,
        preshared_key: bytes,
        keepalive_ns: int | None,
        now: int,
    ) -> None:
        """Know a peer by `peer_key`. A peer of the same key or public key is replaced.

        `preshared_key` is 32 bytes (zeros: none). `keepalive_ns` sends a keepalive after that
        long without traffic, once there was any. Raises ValueError for keys that are unfit.
        """
        if len(public_key) != KEY_BYTES or len(preshared_key) != KEY_BYTES:
            raise ValueError("public and preshared keys have 32 bytes")
        try:
            peer = Peer(
                key=peer_key,
                host=self,
                static=self._static,
                public_key=public_key,
                preshared_key=preshared_key,
                keepalive_ns=keepalive_ns,
                mtu=self._mtu,
                timestamp_offset_ns=self._timestamp_offset_ns,
                randomness=self._randomness,
            )
        except HandshakeError as error:
            raise ValueError("the public key is of small order") from error
        self.remove_peer(peer_key)
        twin = self._peer_by_public.get(public_key)
        if twin is not None:
            self.remove_peer(twin.key)
        self._peer_by_key[peer_key] = peer
        self._peer_by_public[public_key] = peer

    def remove_peer(self, peer_key: Hashable) -> None:
        """Forget a peer and its keys at once; nothing happens if there is none."""
        peer = self._peer_by_key.pop(peer_key, None)
        if peer is None:
            return
        del self._peer_by_public[peer.public_key]
        peer.close()

    def receive(
        self, datagram: bytes, source: Address, now: int
    ) -> tuple[Hashable, list[bytes]] | None:
        """Take one datagram. Answers the peer that proved to have sent it, with its inner packets
        (handshakes and keepalives have none), or None for what was refused."""
        kind = int.from_bytes(datagram[:4], "little")
        if kind == MESSAGE_TRANSPORT and len(datagram) >= TRANSPORT_MIN_BYTES:
            received = self.receive_transports((datagram,), now)
            return None if received is None else (received[0], received[2])
        if kind == MESSAGE_INITIATION and len(datagram) == INITIATION_BYTES:
            return self._receive_initiation(datagram, source, now)
        if kind == MESSAGE_RESPONSE and len(datagram) == RESPONSE_BYTES:
            return self._receive_response(datagram, source, now)
        if kind == MESSAGE_COOKIE and len(datagram) == COOKIE_BYTES:
            self._receive_cookie(datagram, now)
            return None
        self._counts.malformed += 1
        return None

    def receive_transports(
        self, datagrams: Sequence[bytes], now: int
    ) -> tuple[Hashable, int, list[bytes]] | None:
        """Take transport messages that all begin with the same 8 bytes, type and receiver.

        Answers the peer that proved to have sent some, how many it did, and their inner packets
        in order. Each message is authenticated and checked for replay by itself.
        """
        holder = self._holder_by_index.get(int.from_bytes(datagrams[0][4:8], "little"))
        peer, pair = (None, None) if holder is None else holder
        if peer is None or pair is None:
            self._counts.unknown_index += len(datagrams)
            return None
        accepted, packets = peer.receive_transports(
            pair, [each for each in datagrams if len(each) >= TRANSPORT_MIN_BYTES], now
        )
        self._counts.refused_transports += len(datagrams) - accepted
        return (peer.key, accepted, packets) if accepted else None

    def send(self, peer_key: Hashable, packet: bytes, now: int) -> None:
        """Send an inner packet, or queue it (128 at most, the oldest goes) and shake hands first.

        An empty packet is a keepalive. A packet to an unknown peer is dropped and counted.
        """
        self.send_all(peer_key, (packet,), now)

    def send_all(self, peer_key: Hashable, packets: Sequence[bytes], now: int) -> None:
        """Send inner packets to one peer, in order, as `send` does with each."""
        peer = self._peer_by_key.get(peer_key)
        if peer is None:
            self._counts.unknown_peer += len(packets)
            return
        peer.send(packets, now)

    def initiate(self, peer_key: Hashable, now: int) -> None:
        """Shake hands now, also if there is a session; at most once in REKEY_TIMEOUT (5 s)."""
        peer = self._peer_by_key.get(peer_key)
        if peer is None:
            self._counts.unknown_peer += 1
            return
        peer.initiate(now)

    def drain_datagrams(self) -> list[tuple[Hashable | Address, bytes]]:
        """What to send: to a peer by its key, or (a cookie reply) to the `Address` it answers."""
        drained, self._datagrams = self._datagrams, []
        return drained

    def drain_events(self) -> list[Event]:
        """What happened since the last call, oldest first."""
        drained, self._events = self._events, []
        return drained

    def poll_timeout(self) -> int | None:
        """When `handle_timeout` is due, in the clock of `now`; None: nothing is waited for."""
        while self._wakes:
            at, _, peer = self._wakes[0]
            if peer.wake_ns == at:
                return at
            heapq.heappop(self._wakes)
        return None

    def handle_timeout(self, now: int) -> None:
        """Run every timer that is due."""
        while self._wakes and self._wakes[0][0] <= now:
            at, _, peer = heapq.heappop(self._wakes)
            if peer.wake_ns == at:
                peer.wake_ns = NEVER_NS
                peer.handle_timeout(now)

    def statistics(self) -> DeviceStatistics:
        """A copy of the counts."""
        return attrs.evolve(self._counts, peers=len(self._peer_by_key))

    def peer_statistics(self, peer_key: Hashable) -> PeerStatistics | None:
        """The counts of one peer; None if it is not known."""
        peer = self._peer_by_key.get(peer_key)
        return None if peer is None else peer.statistics()

    # --- what a peer asks of its device (PeerHost) ------------------------------------------------

    def allocate_index(self, peer: Peer, holder: KeyPair | None) -> int:
        """A random index that nothing else of this device has."""
        while True:
            index = int.from_bytes(self._randomness.bytes(4), "little")
            if index not in self._holder_by_index:
                self._holder_by_index[index] = (peer, holder)
                return index

    def assign_index(self, index: int, peer: Peer, holder: KeyPair | None) -> None:
        self._holder_by_index[index] = (peer, holder)

    def release_index(self, index: int) -> None:
        self._holder_by_index.pop(index, None)

    def transmit(self, peer: Peer, datagram: bytes) -> None:
        self._datagrams.append((peer.key, datagram))

    def report(self, event: Event) -> None:
        self._events.append(event)

    def wake(self, peer: Peer) -> None:
        self._wake_number += 1
        heapq.heappush(self._wakes, (peer.wake_ns, self._wake_number, peer))

    # --- the four messages ------------------------------------------------------------------------

    def _receive_initiation(
        self, datagram: bytes, source: Address, now: int
    ) -> tuple[Hashable, list[bytes]] | None:
        if not self._admitted(datagram, source, now):
            return None
        try:
            received = open_initiation(self._static, datagram)
            peer = self._peer_by_public.get(received.remote_public)
            if peer is None:
                self._counts.unknown_peer += 1
                return None
            if peer.receive_initiation(received, now):
                return peer.key, []
        except HandshakeError:
            pass  # counted below, like a replay
        self._counts.refused_handshakes += 1
        return None

    def _receive_response(
        self, datagram: bytes, source: Address, now: int
    ) -> tuple[Hashable, list[bytes]] | None:
        if not self._admitted(datagram, source, now):
            return None
        index = int.from_bytes(datagram[8:12], "little")
        holder = self._holder_by_index.get(index)
        if holder is None or not holder[0].owns_initiation(index):
            self._counts.unknown_index += 1
            return None
        peer = holder[0]
        try:
            if peer.receive_response(datagram, now):
                return peer.key, []
        except HandshakeError:
            pass  # counted below
        self._counts.refused_handshakes += 1
        return None

    def _receive_cookie(self, datagram: bytes, now: int) -> None:
        holder = self._holder_by_index.get(int.from_bytes(datagram[4:8], "little"))
        if holder is None or not holder[0].cookies.take(datagram, now):
            self._counts.unknown_index += 1

    def _admitted(self, datagram: bytes, source: Address, now: int) -> bool:
        """MAC1 always; under load MAC2 as well, and a limit per source."""
        if not self._checker.valid_mac1(datagram):
            self._counts.invalid_mac1 += 1
            return False
        if not self._load.overloaded(now):
            return True
        if not self._checker.valid_mac2(datagram, source, now):
            self._counts.cookies_sent += 1
            self._datagrams.append((source, self._checker.reply(datagram, source, now)))
            return False
        if not self._load.admits(source, now):
            self._counts.limited_handshakes += 1
            return False
        return True
